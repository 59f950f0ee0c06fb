"""An update that is never held in memory as a whole: W0, the W_i and their weights, read in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# Entries of a block: less than a megabyte stays in the cache, and is a fraction of any matrix that is
# worth cutting up; of a large matrix two megabytes are less, and products of them a little faster. An
# accelerator wants larger launches.
_CPU_BLOCK, _LARGE_CPU_BLOCK = 5 << 15, 1 << 19
_LARGE_SHARE = 64
_DEVICE_BLOCK = 1 << 26
_SAMPLED_LINES = 64

_DIVISOR: ContextVar[int] = ContextVar("divisor of device blocks", default=1)


@contextmanager
def smaller_pieces() -> Iterator[None]:
    """Let an accelerator that is short of memory work in blocks of a sixty-fourth of the usual size."""
    token = _DIVISOR.set(64 * _DIVISOR.get())
    try:
        yield
    finally:
        _DIVISOR.reset(token)


def device_entries() -> int:
    """Return how many entries an accelerator takes at a time."""
    return max(1, _DEVICE_BLOCK // _DIVISOR.get())


@dataclass(frozen=True)
class Block:
    """A piece of W0 (None for a bare update) and of dW, `[length, small]`, in float32 or float64.

    `base_is_copy` says that the piece of W0 may be overwritten.
    """

    base: Tensor | None
    delta: Tensor
    base_is_copy: bool


@dataclass(frozen=True)
class MatrixUpdate:
    """dW = sum_i w_i (W_i - W0) of one matrix, seen along its longer side.

    The longer side is cut into blocks; every block comes as `[length, small]`, so that a wide matrix
    is read as its transpose. `lines` restricts `line_axis` to the rows or columns that the fine-tuning
    touched; the others are zero in dW and take no part.

    Args:
        base: W0 `[rows, columns]`, or None when `tuned` holds a bare update.
        tuned: the W_i, same shape, any floating dtype.
        weights: w_i, summing to 1.
    """

    base: Tensor | None
    tuned: Sequence[Tensor]
    weights: Sequence[float] = (1.0,)
    line_axis: int = 0
    lines: Tensor | None = None
    _sizes: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = list(self.tuned[0].shape)
        if self.lines is not None:
            sizes[self.line_axis] = len(self.lines)
        object.__setattr__(self, "_sizes", (sizes[0], sizes[1]))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation: float64 for float64 inputs, float32 for all others."""
        return torch.float64 if self.tuned[0].dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole matrix, untouched lines among them."""
        rows, columns = self.tuned[0].shape
        return rows, columns

    @property
    def device(self) -> torch.device:
        """Where the inputs lie and all work is done."""
        return self.tuned[0].device

    @property
    def long_axis(self) -> int:
        """Axis that is cut into blocks."""
        return 0 if self._sizes[0] >= self._sizes[1] else 1

    @property
    def long(self) -> int:
        """Length of the longer side."""
        return self._sizes[self.long_axis]

    @property
    def small(self) -> int:
        """Length of the shorter side."""
        return self._sizes[1 - self.long_axis]

    def hidden_by_rounding(self, norm: float) -> float:
        """Return eps of the result times ||W0|| / ||dW||: what rounding W0 + dW hides, relative to dW.

        0 where the result is rounded to no less than float32: there is no W0, or it is stored in more than
        16 bits.

        Args:
            norm: ||dW||_F.
        """
        if self.base is None or self.base.dtype.itemsize > 2 or norm == 0:
            return 0.0
        # A part of it is enough for a ratio: the middle of the longer side.
        middle = self.long // 2
        start, stop = max(0, middle - _SAMPLED_LINES), min(self.long, middle + _SAMPLED_LINES)
        piece = self._piece(self.base, start, stop).float()
        whole = float(piece.norm()) * math.sqrt(self.long / (stop - start))
        return torch.finfo(self.base.dtype).eps * whole / norm

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the (start, stop) of each block along the longer side."""
        entries = device_entries()
        if self.device.type == "cpu":
            entries = min(_LARGE_CPU_BLOCK, max(_CPU_BLOCK, self.long * self.small // _LARGE_SHARE))
        step = max(128, entries // max(1, self.small))
        for start in range(0, self.long, step):
            yield start, min(start + step, self.long)

    def block(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Block:
        """Return W0 and dW between `start` and `stop` of the longer side."""
        dtype = dtype or self.dtype
        base = None if self.base is None else self._piece(self.base, start, stop).to(dtype)
        delta: Tensor | None = None
        for tensor, weight in zip(self.tuned, self.weights, strict=True):
            piece = self._piece(tensor, start, stop).to(dtype)
            # Without a conversion, a piece is the caller's own tensor.
            own = dtype != tensor.dtype
            if base is not None:
                piece = piece.sub_(base) if own else piece - base
            if weight != 1:
                piece = piece * weight
            delta = piece if delta is None else delta + piece
        if delta is None:
            raise ValueError("an update needs at least one fine-tuned tensor")
        # The layout decides on the order of sums: strided inputs must not give other last digits.
        delta = delta.contiguous()
        copied = self.base is not None and self.base.dtype != dtype
        if self.long_axis == 1:
            return Block(base if base is None else base.T, delta.T, copied)
        return Block(base, delta, copied)

    def write(self, out: Tensor, start: int, stop: int, value: Tensor) -> None:
        """Round `value` `[length, small]` once into its place in `out` `[rows, columns]`."""
        value = value.T if self.long_axis == 1 else value
        if self.lines is None:
            out.narrow(self.long_axis, start, stop - start).copy_(value)
        elif self.line_axis == self.long_axis:
            out.index_copy_(self.line_axis, self.lines[start:stop], value.to(out.dtype))
        else:
            part = out.narrow(self.long_axis, start, stop - start)
            part.index_copy_(self.line_axis, self.lines, value.to(out.dtype))

    def without_untouched_lines(self) -> MatrixUpdate:
        """Return the update restricted to the touched lines of its longer side.

        A sample decides whether to look: an embedding of which the fine-tuning saw few tokens is
        noticed, other matrices cost nothing.
        """
        axis = self.long_axis
        count = self.tuned[0].shape[axis]
        if self.lines is not None or count <= _SAMPLED_LINES:
            return self
        sample = torch.arange(0, count, count // _SAMPLED_LINES, device=self.device)
        if bool(self._touched(axis, sample).all()):
            return self
        touched = [
            self._touched(axis, torch.arange(start, stop, device=self.device)) for start, stop in self.spans()
        ]
        return replace(self, line_axis=axis, lines=torch.cat(touched).nonzero().flatten())

    def _touched(self, axis: int, lines: Tensor) -> Tensor:
        reference = None if self.base is None else self.base.index_select(axis, lines)
        hit = torch.zeros(len(lines), dtype=torch.bool, device=self.device)
        for tensor in self.tuned:
            picked = tensor.index_select(axis, lines)
            # A difference, not a comparison: infinity in both is no untouched line but an error.
            change = picked if reference is None else picked - reference
            hit |= (change != 0).any(dim=1 - axis)
        return hit

    def _piece(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        if self.lines is not None and self.line_axis == self.long_axis:
            return tensor.index_select(self.line_axis, self.lines[start:stop])
        piece = tensor.narrow(self.long_axis, start, stop - start)
        if self.lines is not None:
            piece = piece.index_select(self.line_axis, self.lines)
        return piece

    def peak(self) -> float:
        """Return max |dW|, which is not finite where an input is not."""
        peaks = [float(self.block(*span).delta.abs().max()) for span in self.spans()]
        return math.nan if any(math.isnan(p) for p in peaks) else max(peaks, default=0.0)
