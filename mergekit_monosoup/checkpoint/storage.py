"""How weights are stored, and whether our methods can edit them so."""

from __future__ import annotations

from collections.abc import Iterable

from mergekit_monosoup.checkpoint.headers import Checkpoint, StoredTensor
from mergekit_monosoup.checkpoint.scales import scale_name

_WEIGHT_SUFFIXES = ("weight", "qweight", "weight_packed", "blocks", "W_q", "weight:_data")
_FLOAT8_METHODS = frozenset({"fp8", "fbgemm_fp8"})


def refused_storage(checkpoint: Checkpoint, tensor: StoredTensor) -> str | None:
    """Return why a tensor cannot be edited as it is stored, None where it can."""
    where = f"tensor {tensor.name} of {checkpoint.name} ({tensor.file}) is stored as {tensor.dtype}"
    if tensor.dtype.startswith("float8") and scale_name(tensor.name, checkpoint.tensors) is None:
        return (
            f"{where} and has no scale beside it ({tensor.name}_scale_inv or {tensor.name}_scale), so its "
            "values are not known; use the bfloat16 checkpoint that it was made from"
        )
    if _is_quantised_weight(tensor):
        return f"{where}, so the checkpoint is quantised; dequantise it to float16, bfloat16 or float32 first"
    return None


def refused_checkpoint(checkpoint: Checkpoint) -> str | None:
    """Return why a checkpoint cannot be edited as it is stored, None where it can.

    As `quantized.refuse_quantized_checkpoint` does for files that mergekit has opened: by every tensor,
    planned or not, and pickled files by the configuration.
    """
    for tensor in checkpoint.tensors.values():
        message = refused_storage(checkpoint, tensor)
        if message is not None:
            return message
    config = checkpoint.config.get("quantization_config")
    pickled = any(not tensor.file.endswith(".safetensors") for tensor in checkpoint.tensors.values())
    if pickled and config and config.get("quant_method") not in _FLOAT8_METHODS:
        return (
            f"config.json of {checkpoint.name} says that its weights are quantised "
            f"({config.get('quant_method')}); dequantise them to float16, bfloat16 or float32 first"
        )
    return None


def promoted_dtype(dtypes: set[str]) -> str:
    """Return the dtype of a result where the recipe names none."""
    if any(dtype.startswith("float8") for dtype in dtypes):
        # What dequantised weights are stored as where the recipe names no dtype.
        return "bfloat16"
    for wide in ("float64", "float32"):
        if wide in dtypes:
            return wide
    return next(iter(dtypes)) if len(dtypes) == 1 else "float32"


def _is_quantised_weight(tensor: StoredTensor) -> bool:
    """Say whether a tensor is a weight matrix stored as integers (GPTQ, AWQ, bitsandbytes and the like)."""
    matrix = len(tensor.shape) >= 2 and tensor.name.endswith(_WEIGHT_SUFFIXES)
    return matrix and (not tensor.is_floating or tensor.dtype.startswith("float4"))


def wide_tensors(tensors: Iterable[StoredTensor]) -> frozenset[str]:
    """Return the float32 tensors of a checkpoint that is in 16 bits otherwise.

    What is kept in float32 on purpose (a router's correction bias) loses its meaning in 16 bits.
    """
    held = list(tensors)
    narrow = sum(t.size for t in held if t.dtype in ("bfloat16", "float16"))
    wide = [t for t in held if t.dtype == "float32"]
    return frozenset(t.name for t in wide) if narrow > sum(t.size for t in wide) else frozenset()
