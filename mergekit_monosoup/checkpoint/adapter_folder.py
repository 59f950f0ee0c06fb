"""A PEFT adapter as its configuration and the header of its weights describe it; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.documents import read_json, shown
from mergekit_monosoup.checkpoint.headers import StoredTensor, header_of
from mergekit_monosoup.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_LARGEST_CONFIG = 16_000_000
_HIGHEST_RANK = 1 << 20


@dataclass(frozen=True)
class AdapterFolder:
    """Configuration and headers of an adapter on disk."""

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds an adapter, and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_adapter_folder(source: str, folder: Path) -> AdapterFolder:
    """Read the configuration and the header of an adapter.

    Args:
        source: what messages call it.
        folder: where it lies.

    Raises:
        AdapterError: a file is missing, or a value has a type that no adapter has.
        InputError: a file is damaged.
    """
    config = read_adapter_config(source, folder)
    file = next((folder / name for name in (WEIGHTS, PICKLE) if (folder / name).is_file()), None)
    if file is None:
        raise AdapterError(f"adapter {source} has neither {WEIGHTS} nor {PICKLE}")
    return AdapterFolder(source, config, header_of(file))


def read_adapter_config(source: str, folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter.

    Raises:
        AdapterError: there is none, or a value has a type that no adapter has.
        InputError: the file is damaged.
    """
    try:
        config: dict[str, Any] = read_json(folder / CONFIG, _LARGEST_CONFIG)
    except OSError as error:
        raise AdapterError(
            f"adapter {source} has no {CONFIG}; is it the folder of a PEFT adapter?"
        ) from error
    _check_config(source, config)
    return config


def _check_config(source: str, config: Any) -> None:
    if not isinstance(config, dict):
        raise AdapterError(f"adapter {source}: {CONFIG} holds no configuration; download it again")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    patterns = [config.get(key) for key in ("rank_pattern", "alpha_pattern")]
    for key, sound, wanted in (
        ("peft_type", isinstance(config.get("peft_type"), str), "a text"),
        ("r", rank is None or (type(rank) is int and 0 < rank <= _HIGHEST_RANK), "a rank"),
        ("lora_alpha", alpha is None or type(alpha) in (int, float), "a number"),
        ("target_modules", _is_names(config.get("target_modules")), "a list of names"),
        ("target_parameters", _is_names(config.get("target_parameters")), "a list of names"),
        ("modules_to_save", _is_names(config.get("modules_to_save")), "a list of names"),
        ("rank_pattern", _is_pattern(patterns[0]), "a mapping of names to numbers"),
        ("alpha_pattern", _is_pattern(patterns[1]), "a mapping of names to numbers"),
        (
            "base_model_name_or_path",
            isinstance(config.get("base_model_name_or_path"), (str, type(None))),
            "a text",
        ),
    ):
        if not sound:
            raise AdapterError(
                f"adapter {source}: {key} of {CONFIG} is {shown(config.get(key))} where {wanted} belongs; "
                "download it again"
            )


def _is_names(value: Any) -> bool:
    return isinstance(value, (str, type(None))) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _is_pattern(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())
    )
