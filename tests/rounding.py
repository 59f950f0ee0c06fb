"""Round to nearest even into a storage dtype, straight from float64.

torch converts float64 to bfloat16 and float16 by way of float32, which rounds
twice and is wrong where the first rounding lands on a tie. Here a value is
scaled to an integer count of spacings, an exact step, and rounded once.
"""

from __future__ import annotations

import math

import numpy as np
import torch

# significant bits (the leading one counted), exponent of the smallest normal, largest finite
FORMATS = {
    torch.float32: (24, -126, float(torch.finfo(torch.float32).max)),
    torch.bfloat16: (8, -126, float(torch.finfo(torch.bfloat16).max)),
    torch.float16: (11, -14, float(torch.finfo(torch.float16).max)),
}


def exponent_of_spacing(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """e, where 2**e is the distance between neighbours of `x` in `dtype`."""
    bits, smallest, _ = FORMATS[dtype]
    _, exponent = np.frexp(np.abs(x))
    # frexp counts from a mantissa in [0.5, 1); zero falls to the subnormal spacing.
    return np.where(x == 0, smallest, np.maximum(exponent - 1, smallest)) - (bits - 1)


def spacing(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Distance between the neighbours of |x| in `dtype`, as float64."""
    x = np.asarray(x, dtype=np.float64)
    if dtype == torch.float64:
        return np.spacing(np.abs(x))
    return np.ldexp(1.0, exponent_of_spacing(x, dtype))


def round_to(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The nearest values of `dtype`, ties to even, kept in a float64 array."""
    x = np.asarray(x, dtype=np.float64)
    if dtype == torch.float64:
        return x.copy()
    exponent = exponent_of_spacing(x, dtype)
    rounded = np.ldexp(np.rint(np.ldexp(x, -exponent)), exponent)
    largest = FORMATS[dtype][2]
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, x), rounded)


def as_float64(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of any floating dtype as a float64 array, exactly."""
    return tensor.detach().cpu().to(torch.float64).numpy()


def assert_correctly_rounded(
    actual: torch.Tensor,
    exact: np.ndarray,
    dtype: torch.dtype,
    min_fraction: float = 0.999,
    label: str = "tensor",
    floor: float = 0.0,
) -> tuple[int, int]:
    """Nearly all entries are `exact` rounded once; the rest are a neighbour of that.

    `floor` is an error that is allowed everywhere: an entry that cancels to almost nothing has
    spacings finer than the arithmetic behind it. It makes no entry correctly rounded.
    Returns (entries that are correctly rounded, entries).
    """
    assert actual.dtype == dtype, f"{label}: {actual.dtype}, not {dtype}"
    assert tuple(actual.shape) == exact.shape, f"{label}: {tuple(actual.shape)}, not {exact.shape}"
    got, best = as_float64(actual), round_to(exact, dtype)
    equal = got == best
    off = np.abs(got - best)
    allowed = np.maximum(np.maximum(spacing(got, dtype), spacing(best, dtype)), floor)
    worst = float(np.where(equal, 0.0, off / allowed).max(initial=0.0))
    assert worst <= 1.0, f"{label}: {worst} spacings from the correctly rounded value"
    missed = int((~equal).sum())
    expected = (1.0 - min_fraction) * equal.size
    # A small tensor is a small sample of that fraction: four standard deviations of a count.
    assert missed <= expected + 4.0 * math.sqrt(expected), (
        f"{label}: {missed} of {equal.size} entries are not correctly rounded"
    )
    return equal.size - missed, equal.size
