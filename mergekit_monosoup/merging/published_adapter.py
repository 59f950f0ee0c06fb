"""Whether an adapter's folder is fit to be given to others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import isfinite

from mergekit_monosoup.checkpoint.adapter_folder import read_adapter_folder
from mergekit_monosoup.checkpoint.card import front_matter
from mergekit_monosoup.errors import AdapterError, InputError, NonFiniteError, UnsupportedAdapterError
from mergekit_monosoup.lora.adapter import read_adapter, read_config
from mergekit_monosoup.merging.verify import Verification


def check_adapter(folder: Path, seen: Callable[[str, int], None] = lambda name, size: None) -> Verification:
    """Check that an adapter is whole: peft knows its configuration, and its tensors fit it and are finite.

    Args:
        folder: of the adapter.
        seen: called for each tensor that is checked, with its name and number of bytes.

    Raises:
        AdapterError: a file or factor is missing or damaged, or names a folder of this machine.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
        raise AdapterError(
            f"{folder / WEIGHTS_NAME} is pickled; only safetensors files are uploaded: save the adapter "
            "again by peft's save_pretrained"
        )
    found = read_adapter_folder(str(folder), folder)
    _refuse_local_base(folder / CONFIG_NAME, found.config.get("base_model_name_or_path"))
    _refuse_local_base(folder / "README.md", front_matter(folder / "README.md").get("base_model"))
    read_config(str(folder), folder)
    if found.config.get("peft_type") == "LORA":
        # What is not linear may be whole all the same; only the edit by factors is not for it.
        with suppress(UnsupportedAdapterError):
            read_adapter(str(folder))
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as opened:
            for name in found.tensors:
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not bool(isfinite(tensor.float()).all()):
                    raise NonFiniteError(
                        f"tensor {name} in {folder} holds NaN or infinity; training diverged"
                    )
                seen(name, tensor.numel() * tensor.element_size())
    except SafetensorError as error:
        file = folder / SAFETENSORS_WEIGHTS_NAME
        raise InputError(f"{file} cannot be read ({error}); save it again") from error
    return Verification(len(found.tensors), sum(tensor.size for tensor in found.tensors.values()))


def _refuse_local_base(file: Path, named: Any) -> None:
    for name in named if isinstance(named, list) else [named]:
        if isinstance(name, str) and (
            name[:1] in ("/", ".", "~", "\\") or name.count("/") > 1 or ":" in name
        ):
            raise AdapterError(
                f"{file} names the base model by a folder of this machine; write its id on the Hub "
                "(user/name) there before others are to use the adapter"
            )
