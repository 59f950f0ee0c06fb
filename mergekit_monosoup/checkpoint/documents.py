"""The JSON files of a checkpoint, by whomever they were written: bounded, and of the types they must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mergekit_monosoup.errors import InputError

_LARGEST_CONFIG = 16_000_000
_LARGEST_INDEX = 100_000_000
# No model of transformers has so many layers, and nothing is gained by counting on.
MOST_LAYERS = 10_000
# Of a path, on the file systems that are in use.
_LONGEST_PART = 255
# As transformers has them in nearly every configuration; whether a model can be built it says itself.
_WHOLE_NUMBERS = frozenset(
    {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    }
)
_PARTS = ("text_config", "vision_config", "audio_config")


def read_json(file: Path, largest: int) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: too large, not JSON, or nested without end; names the file.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        raw = stream.read(largest + 1)
    if len(raw) > largest:
        raise InputError(f"{file} is larger than {largest:,} bytes; is it what its name says?")
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError as error:
        raise InputError(f"{file} is nested too deep to be read; download it again") from error
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({first_line(error)}); download it again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        InputError: missing, not JSON, or with values of the wrong type where plans look.
    """
    file = folder / "config.json"
    try:
        config = read_json(file, _LARGEST_CONFIG)
    except OSError as error:
        raise InputError(f"{folder} has no config.json; is it a model in transformers' format?") from error
    return checked_config(config, str(file))


def checked_config(config: Any, file: str) -> dict[str, Any]:
    """Return a configuration whose values are of the types that plans and transformers rely on.

    Raises:
        InputError: they are not; names file and key.
    """
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no configuration; download it again")
    _check_part(config, file, "")
    for name in _PARTS:
        part = config.get(name)
        if isinstance(part, dict):
            _check_part(part, file, f"{name}.")
        elif part is not None:
            raise _wrong(file, name, part, "a mapping")
    return config


def _check_part(config: Mapping[str, Any], file: str, prefix: str) -> None:
    for key in _WHOLE_NUMBERS & config.keys():
        value = config[key]
        # Some architectures give a list, one entry a layer.
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (type(number) is not int or number < 0):
                raise _wrong(file, prefix + key, value, "a whole number")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise _wrong(file, f"{prefix}num_hidden_layers", layers, f"a number up to {MOST_LAYERS}")
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise _wrong(file, f"{prefix}model_type", kind, "a text")
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list)
        and all(isinstance(name, str) and name.isprintable() and len(name) < _LONGEST_PART for name in names)
    ):
        raise _wrong(file, f"{prefix}architectures", names, "a list of names")
    quantised = config.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise _wrong(file, f"{prefix}quantization_config", quantised, "a mapping")


def _wrong(file: str, key: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{file}: {key} is {shown(value)} where {wanted} belongs; download it again")


def shown(value: Any) -> str:
    """Return a value as a message shows it, cut where it is long."""
    text = ascii(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: Exception) -> str:
    """Return what somebody else's error says, in a line that is not too long."""
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def read_index(index: Path) -> dict[str, str]:
    """Read which shard holds which tensor.

    Raises:
        InputError: not an index, or one that names files elsewhere.
    """
    content = read_json(index, _LARGEST_INDEX)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} is not an index of shards; download it again")
    for name in set(weight_map.values()):
        if not stays_inside(name):
            raise InputError(
                f"{index} places tensors in {shown(name)}, which is no file of the same folder; do not use "
                "this checkpoint"
            )
    return weight_map


def stays_inside(name: str) -> bool:
    """Say whether a relative path, by its spelling, names something inside the folder it starts from."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return (
        bool(name)
        and name.isprintable()
        and all(len(part.encode()) <= _LONGEST_PART for part in posix.parts)
        and not posix.is_absolute()
        and not windows.drive
        and not windows.root
        and ".." not in windows.parts
    )
