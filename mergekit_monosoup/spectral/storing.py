"""How a result that was computed in float32 or float64 is rounded into the dtype it is stored in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]

# Digits of float32's significand that a dtype drops, and the power of two that brings its subnormal numbers
# to those of float32, so that the same digits are dropped there.
_COARSE = {torch.bfloat16: (16, 0), torch.float16: (13, -112)}
# Numbers of 16 bits in one state of the generator.
_DRAWS = 4
# Entries of a matrix from which the survival of an edit is estimated, at least.
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Storage:
    """The dtype in which a result ends up, and how it is rounded on the way.

    `nearest` rounds to the nearest neighbour, ties to even; `stochastic` to either neighbour, to the nearer
    one more often, so that the expected value is the value itself. A number on the grid stays as it is. The
    random numbers belong to the tensor's name and the position of the entry: they do not depend on threads,
    blocks, devices or machines.

    Args:
        rounding: how to round.
        name: of the tensor.
        dtype: the coarsest dtype that the result passes through on the way into its file; None: its own.
    """

    rounding: Rounding = "nearest"
    name: str = ""
    dtype: torch.dtype | None = None

    def rounded(self, value: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
        """Return values on the grid of the storage dtype where stochastic rounding asks for it.

        Args:
            value: `[...]`, float32 or float64.
            dtype: of the result that the values are copied to, where this has no dtype of its own.
            start: position of the first entry in the tensor; entries follow in the order of the axes.

        Returns:
            Numbers in a dtype that holds them exactly; `value` itself for `nearest`, and where nothing
            coarser than float32 is written.
        """
        dtype = self.dtype or dtype
        if self.rounding == "nearest" or dtype not in _COARSE:
            return value
        digits, shift = _COARSE[dtype]
        value = _in_range(value.float(), dtype)
        if shift:
            value = value * 2.0**shift
        mask = (1 << digits) - 1
        drawn = self._draws(start, value.numel()).view(value.shape).to(value.device)
        if value.ndim == 2 and value.stride(0) == 1:
            # Turned once: sums over entries that lie otherwise in memory take twice the time.
            drawn = drawn.T.contiguous().T
        bits = drawn.to(torch.int32).bitwise_and_(mask).add_(value.view(torch.int32)).bitwise_and_(~mask)
        result = bits.view(torch.float32)
        return result * 2.0**-shift if shift else result

    def _draws(self, start: int, count: int) -> Tensor:
        """Return random numbers `start` to `start + count` of this tensor, 16 bits each."""
        seed = int.from_bytes(blake2b(self.name.encode(), digest_size=16).digest(), "little")
        skipped, before = divmod(start, _DRAWS)
        source = np.random.PCG64DXSM(seed).advance(skipped)
        words = -(-(before + count) // _DRAWS)
        # All 64 bits of each state, as `random_raw` gives them, but without the interpreter's lock.
        drawn = np.random.Generator(source).integers(0, 2**64 - 1, words, np.uint64, endpoint=True)
        return torch.from_numpy(drawn.astype("<u8", copy=False).view("<i2")[before : before + count])

    def survival(self, dtype: torch.dtype, intended: Tensor, rounded: Tensor, tuned: Tensor) -> Tensor:
        """Return <E', E>, <E, E> and ||W1||^2, with E = W - W1 intended and E' = W' - W1 written.

        Args:
            dtype: of the result, as in `rounded`.
            intended: W, unrounded; rounded: the same as `rounded` returned it; tuned: W1. All of one shape.

        Returns:
            `[3]`; sums over these entries.
        """
        written = rounded.to(self.dtype or dtype).to(tuned.dtype)
        edit = intended - tuned
        return torch.stack([((written - tuned) * edit).sum(), edit.square().sum(), tuned.square().sum()])


NEAREST = Storage()


def sampled_lines(count: int, entries: int, start: int = 0) -> slice:
    """Return evenly spaced lines of a block, the same ones however a matrix is cut into blocks.

    Args:
        count, entries: lines and entries of the matrix.
        start: first line of the block.
    """
    step = max(1, min(count, entries // _SAMPLE))
    return slice(-start % step, None, step)


def survived(sums: Sequence[Tensor]) -> tuple[float, float]:
    """Return <E', E> and <E, E> of a matrix, both 0 where E is nothing but the rounding of float32.

    Args:
        sums: as `Storage.survival` returns them, for parts of the matrix.
    """
    if not sums:
        return 0.0, 0.0
    found, intended, size = torch.stack(list(sums)).cpu().double().sum(0).tolist()
    smallest = (4 * torch.finfo(torch.float32).eps) ** 2 * size
    return (found, intended) if intended > smallest else (0.0, 0.0)


def _in_range(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring values that nearest rounding would take for the largest finite one into the range."""
    if value.numel() == 0:
        return value
    info = torch.finfo(dtype)
    low, high = (float(x) for x in torch.aminmax(value))
    if max(-low, high) <= info.max:
        return value
    # Half a spacing above the largest number, infinity is nearer; float32 ends before that for bfloat16.
    limit = info.max * (1 + info.eps / 4) if dtype == torch.float16 else math.inf
    return torch.where(value.abs() < limit, value.clamp(-info.max, info.max), value)
