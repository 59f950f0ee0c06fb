"""Weights stored as float8 with scales beside them: what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from mergekit_monosoup.checkpoint.scales import SCALE_SUFFIXES, is_scale, scale_name
from mergekit_monosoup.errors import QuantizedWeightError

FLOAT8 = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
# What a dequantised weight is stored as where the recipe names no dtype.
DEQUANTISED = torch.bfloat16
_BLOCK = 128


def dequantise(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """Return weight * scale in float32.

    Args:
        weight: float8, or a wider dtype that holds the same values.
        scale: one factor for the tensor, one for each row (`[out]` or `[out, 1]`), or one for each
            block, of 128 by 128 or of whatever divides the weight evenly.
        name: for the message.

    Raises:
        QuantizedWeightError: the shapes do not fit.
    """
    factor = scale.float()
    if factor.ndim == 1 and weight.ndim > 1 and factor.numel() == weight.shape[0]:
        factor = factor.reshape(-1, *[1] * (weight.ndim - 1))
    if factor.numel() == 1:
        return weight.float() * factor.reshape(())
    if factor.ndim != weight.ndim:
        raise _does_not_fit(weight, scale, name)
    for axis, (length, count) in enumerate(zip(weight.shape, factor.shape, strict=True)):
        if count in (1, length):
            continue
        if count == ceil(length / _BLOCK):
            step = _BLOCK
        elif length % count == 0:
            step = length // count
        else:
            raise _does_not_fit(weight, scale, name)
        factor = factor.repeat_interleave(step, axis).narrow(axis, 0, length)
    return weight.float() * factor


def dequantise_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with float8 weights in bfloat16, and without their scales.

    Raises:
        QuantizedWeightError: a float8 weight without a scale.
    """
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT8:
            scale = scale_name(name, tensors)
            if scale is None:
                raise missing_scale(name, tensor.dtype)
            result[name] = dequantise(tensor, tensors[scale], name).to(DEQUANTISED)
        elif not _scales_float8(name, tensors):
            result[name] = tensor
    return result


def missing_scale(name: str, dtype: object, where: str = "") -> QuantizedWeightError:
    """Return the error for a float8 weight whose scale is not there."""
    return QuantizedWeightError(
        f"tensor {name}{where} is stored as {dtype} and has no scale beside it ({name}_scale_inv or "
        f"{name}_scale), so its values are not known; use the bfloat16 checkpoint that it was made from"
    )


def _scales_float8(name: str, tensors: Mapping[str, Tensor]) -> bool:
    if not is_scale(name, tensors):
        return False
    owner = name.removesuffix("input_scale") + "weight" if name.endswith("input_scale") else None
    owner = owner or next(name.removesuffix(s) for s in SCALE_SUFFIXES if name.endswith(s))
    return tensors[owner].dtype in FLOAT8


def _does_not_fit(weight: Tensor, scale: Tensor, name: str) -> QuantizedWeightError:
    return QuantizedWeightError(
        f"tensor {name}: a scale of shape {tuple(scale.shape)} does not fit a weight of shape "
        f"{tuple(weight.shape)}; dequantise the checkpoint with the library that wrote it first"
    )
