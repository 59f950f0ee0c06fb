"""How much of an update is nothing but the rounding of the stored weights."""

from __future__ import annotations

import torch
from torch import Tensor

# Sums over a tensor are estimated from this many of its entries: their relative error is about 1 %.
_SAMPLE = 1 << 13


def storage_dtype(tensor: Tensor) -> torch.dtype:
    """Return the coarsest floating dtype that holds all (sampled) entries of a tensor exactly.

    A checkpoint that was trained and kept in bfloat16 carries bfloat16's rounding even where its file,
    or the recipe's `dtype`, is float32; the values show it.
    """
    return rounding_variance(tensor)[1]


def rounding_variance(tensor: Tensor) -> tuple[float, torch.dtype]:
    """Return the expected squared norm of a stored tensor's rounding error, and the dtype it is due to.

    Rounding to the nearest number of a grid with spacing q leaves an error that is uniform in
    [-q/2, q/2], with variance q^2 / 12. q is the spacing of the storage dtype at each entry's magnitude:
    2^floor(log2 |w|) * eps, from below bounded by the spacing of the subnormal numbers.
    """
    if tensor.numel() == 0:
        return 0.0, tensor.dtype
    values = sample(tensor)
    if tensor.dtype == torch.float64:
        wide, shift, mask, bias = values.view(torch.int64), 52, 0x7FF, 1023
        dtype = tensor.dtype
    else:
        values = values.float()
        wide, shift, mask, bias = values.view(torch.int32), 23, 0xFF, 127
        dtype = _grid(values, wide, tensor.dtype)
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    # The exponents, counted: one transfer from the device, and no logarithm of any entry.
    counts = torch.bincount((wide >> shift) & mask, minlength=mask + 1).tolist()
    # Exponent 0 is zero, which is stored exactly (or a subnormal number of the wide format).
    squares = (
        count * max(info.eps * 2.0 ** (exponent - bias), smallest) ** 2
        for exponent, count in enumerate(counts)
        if count and 0 < exponent < mask
    )
    return tensor.numel() * sum(squares) / values.numel() / 12, dtype


def _grid(values: Tensor, bits: Tensor, dtype: torch.dtype) -> torch.dtype:
    if dtype in (torch.bfloat16, torch.float16):
        return dtype
    if not bool((bits & 0xFFFF).any()):
        return torch.bfloat16
    if bool((values.half().float() == values).all()):
        return torch.float16
    return dtype


def sample(tensor: Tensor) -> Tensor:
    """Return evenly spaced entries of a tensor, all of them where there are few."""
    if tensor.numel() <= _SAMPLE:
        return tensor.detach().reshape(-1)
    if tensor.is_contiguous():
        # A stride that shares no factor with the usual widths visits all rows and columns.
        step = tensor.numel() // _SAMPLE
        step += 1 - step % 2
        return tensor.detach().view(-1)[:: max(1, step)]
    return tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLE)]
