"""How much of an update is nothing but the rounding of the stored weights."""

from __future__ import annotations

import torch
from torch import Tensor

# Sums over a tensor are estimated from this many of its entries: their relative error is below 1 %.
_SAMPLE = 1 << 15


def storage_dtype(tensor: Tensor) -> torch.dtype:
    """Return the coarsest floating dtype that holds all (sampled) entries of a tensor exactly.

    A checkpoint that was trained and kept in bfloat16 carries bfloat16's rounding even where its file,
    or the recipe's `dtype`, is float32; the values show it.
    """
    return _storage_dtype(sample(tensor).float(), tensor.dtype)


def _storage_dtype(values: Tensor, dtype: torch.dtype) -> torch.dtype:
    for coarse in (torch.bfloat16, torch.float16):
        if dtype == coarse or bool((values.to(coarse).float() == values).all()):
            return coarse
    return dtype


def rounding_variance(tensor: Tensor) -> tuple[float, torch.dtype]:
    """Return the expected squared norm of a stored tensor's rounding error, and the dtype it is due to.

    Rounding to the nearest number of a grid with spacing q leaves an error that is uniform in
    [-q/2, q/2], with variance q^2 / 12. q is the spacing of the storage dtype at each entry's magnitude:
    2^floor(log2 |w|) * eps, from below bounded by the spacing of the subnormal numbers.
    """
    if tensor.numel() == 0:
        return 0.0, tensor.dtype
    values = sample(tensor)
    values = values if values.dtype == torch.float64 else values.float()
    dtype = _storage_dtype(values.float(), tensor.dtype) if tensor.dtype != torch.float64 else tensor.dtype
    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent - 1
    ulp = torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent)
    ulp = ulp.clamp_min(info.smallest_normal * info.eps)
    # A zero is stored exactly.
    mean_square = float(torch.where(values == 0, 0.0, ulp).square().mean())
    return tensor.numel() * mean_square / 12, dtype


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
