"""Merging by peft itself, for adapters that are not linear: by names that it knows, and never in part."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from mergekit.common import ModelPath, ModelReference
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from mergekit_monosoup.checkpoint.pinned import source_of
from mergekit_monosoup.errors import AdapterError, UnsupportedAdapterError
from mergekit_monosoup.lora.adapter import fetch, read_adapter, read_config, read_tensors
from mergekit_monosoup.lora.keys import plain_keys

# What peft says of an adapter of which it has not found all tensors; it goes on with untrained ones.
_MISSING = "missing adapter keys"


def with_peft_names(reference: ModelReference, folder: Path) -> ModelReference:
    """Return a `base+adapter` whose LoRA adapter has the names and the packing that peft expects.

    Args:
        reference: what is to be merged.
        folder: for a copy of the adapter; made where one is needed.

    Raises:
        AdapterError: the files are damaged, or the names are not those of an adapter.
    """
    source = source_of(reference.lora)
    held = fetch(source)
    if not isinstance(read_config(source, held), LoraConfig):
        return reference
    settings = json.loads((held / CONFIG_NAME).read_text("utf-8"))
    stored = read_tensors(source, held)
    try:
        adapter = read_adapter(source)
        tensors, wanted = adapter.tensors, adapter.settings
    except UnsupportedAdapterError:
        tensors, wanted = plain_keys(source, stored), settings
    if tensors.keys() == stored.keys() and wanted == settings:
        return reference
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(json.dumps(wanted), "utf-8")
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return reference.model_copy(update={"lora": ModelPath(path=str(folder))})


def merged_by_peft(
    reference: ModelReference, folder: Path, *, trust_remote_code: bool, dtype: str | None
) -> Path:
    """Have mergekit merge an adapter into its base by peft; return the folder of the result.

    Raises:
        AdapterError: peft finds no value for some of the adapter, and would merge what it was initialised to.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = reference.merged(
            cache_dir=str(folder), trust_remote_code=trust_remote_code, lora_merge_dtype=dtype
        )
    for warning in said:
        text = str(warning.message)
        if _MISSING in text:
            first = text.partition("[")[2].partition(",")[0].rstrip("].")
            raise AdapterError(
                f"adapter {reference.lora} is not of base {reference.model}: peft has found no value for "
                f"{first}; name the base that it was trained on"
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return Path(merged.model.path)
