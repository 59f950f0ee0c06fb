"""Recognise checkpoints whose weights cannot be edited as they are stored, before any is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from mergekit_monosoup.checkpoint.float8 import missing_scale
from mergekit_monosoup.checkpoint.scales import scale_name
from mergekit_monosoup.errors import QuantizedWeightError

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# Integer buffers such as position ids are fine; integer matrices under these names are weights.
_WEIGHT_SUFFIXES = ("weight", "qweight", "weight_packed", "blocks", "W_q", "weight:_data")
_INTEGER_TYPES = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4"})
_FLOAT8_TYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"})
_FLOAT8_METHODS = frozenset({"fp8", "fbgemm_fp8"})


def refuse_quantized_checkpoint(model: ModelReference, is_base: bool = False) -> None:
    """Refuse a checkpoint with integer weights, or with float8 weights whose scales are missing.

    Reads safetensors headers and `config.json` only, and only of files that mergekit has at hand.

    Args:
        model: the checkpoint.
        is_base: refuse a float8 checkpoint whose config.json mergekit's own commands would copy.

    Raises:
        QuantizedWeightError: names the file, the tensor, its storage type and the remedy.
    """
    folder, files, held = _opened(model)
    config = quantization_config(folder)
    float8 = False
    for path in files:
        if path.endswith(".safetensors"):
            float8 |= _check_headers(model, path, held, config)
        elif config and config.get("quant_method") not in _FLOAT8_METHODS:
            raise _integers(model, "its weights", os.path.basename(path), "integers", config)
    if float8 and is_base and config:
        raise QuantizedWeightError(
            f"{model} (the base) is stored as float8; mergekit would copy its quantization_config into the "
            "config.json of the merged model, whose weights are no longer float8. Run this recipe with "
            "`mergekit-monosoup merge`, which removes it"
        )


def quantization_config(folder: Path | None) -> dict[str, Any]:
    """Return `quantization_config` of a checkpoint's config.json, empty where there is none."""
    file = folder / "config.json" if folder else None
    if file is None or not file.is_file():
        return {}
    found = json.loads(file.read_text("utf-8")).get("quantization_config")
    return found if isinstance(found, dict) else {}


def _check_headers(
    model: ModelReference, path: str, held: Mapping[str, Any], config: Mapping[str, Any]
) -> bool:
    """Refuse what cannot be edited in one file; say whether it holds float8 weights with scales."""
    float8, base_name = False, os.path.basename(path)
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        held = held or dict.fromkeys(names)
        for name in names:
            view = file.get_slice(name)
            dtype = view.get_dtype()
            if dtype in _FLOAT8_TYPES:
                if scale_name(name, held) is None:
                    raise missing_scale(name, dtype, f" in {base_name} of {model}")
                if Path(model.model.path).is_file():
                    raise QuantizedWeightError(
                        f"{path}: tensor {name} is stored as {dtype} with a scale beside it, and "
                        "mergekit-pytorch would merge the two as tensors of their own; use "
                        "mergekit_monosoup.edit_state_dict, or dequantise the file first"
                    )
                float8 = True
            elif name.endswith(_WEIGHT_SUFFIXES) and dtype in _INTEGER_TYPES and len(view.get_shape()) >= 2:
                raise _integers(
                    model, f"tensor {name}", os.path.basename(path), f"integers ({dtype})", config
                )
    return float8


def _integers(
    model: ModelReference, what: str, file: str, stored: str, config: Mapping[str, Any]
) -> QuantizedWeightError:
    method = f" ({config['quant_method']})" if "quant_method" in config else ""
    return QuantizedWeightError(
        f"{model}: {what} in {file} is stored as {stored}, so the checkpoint is quantised{method}; "
        "dequantise it to float16, bfloat16 or float32 first (for instance model.dequantize() in "
        "transformers)"
    )


def _opened(model: ModelReference) -> tuple[Path | None, list[str], Mapping[str, Any]]:
    """Return folder, weight files and tensor names of a checkpoint, as far as mergekit has opened it."""
    path = Path(model.model.path)
    if path.is_file():
        return None, [str(path)], {}
    from mergekit.io.tasks import LoaderCache

    loader = LoaderCache.loaders.get(model)
    if loader is None:
        return None, [], {}
    index = loader.index
    files = [os.path.join(index.base_path, shard.filename) for shard in index.shards]
    return Path(index.base_path), files, index.tensor_paths
