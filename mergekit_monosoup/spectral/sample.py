"""A look at a few lines of an update: what kind of spectrum is to be expected.

What is concluded here decides on time alone; whatever is found from it is certified like everything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_monosoup.spectral.update import MatrixUpdate

# Lines that are looked at: few enough to cost a few per cent of a decomposition.
_LINES = 256
# In sides of so many lines: an accelerator decomposes smaller matrices in a few of its own samples' times.
_WORTHWHILE_ON_A_DEVICE = 8


@dataclass(frozen=True)
class Sample:
    """Singular values `[256]` of the sampled lines, descending, float64, and their directions."""

    values: Tensor
    _lines: Tensor
    _left: Tensor

    @property
    def participation(self) -> float:
        """(sum_i l_i)^2 / (256 sum_i l_i^2) of l_i = s_i^2: 1 for a flat spectrum, 1/256 for rank 1."""
        squares = self.values.square()
        return float(squares.sum() ** 2 / (len(squares) * squares.square().sum()))

    @property
    def numerical_rank(self) -> int:
        """Number of singular values above the noise of float32 products."""
        return numerical_rank(self.values)

    def directions(self, q: int) -> Tensor:
        """Return the leading q right singular directions, float64 `[small, q]`."""
        return self._lines.double().T @ (self._left[:, :q] / self.values[:q])


def numerical_rank(values: Tensor) -> int:
    """Return how many singular values `[q]`, descending, stand above the noise of float32 products."""
    noise = math.sqrt(torch.finfo(torch.float32).eps) * float(values[0])
    return int((values > noise).sum())


def sample(update: MatrixUpdate) -> Sample | None:
    """Decompose evenly spaced lines of the longer side; None if they hold nothing to go by.

    That is: the update is too small, on an accelerator too small for a decomposition to cost much; zero or
    not finite in these lines.
    """
    if update.small <= (2 if update.device.type == "cpu" else _WORTHWHILE_ON_A_DEVICE) * _LINES:
        return None
    lines = _evenly_spaced(update)
    peak = float(lines.abs().max())
    if not 0 < peak < math.inf:
        return None
    # A power of two changes no digit.
    lines = lines * 2.0 ** max(-126, min(126, -math.frexp(peak)[1]))
    values, left = torch.linalg.eigh((lines @ lines.T).double())
    return Sample(values.flip(0).clamp(min=0).sqrt(), lines, left.flip(1))


def _evenly_spaced(update: MatrixUpdate) -> Tensor:
    """Return lines of the longer side of dW, `[256, small]`."""
    chosen = torch.linspace(0, update.long - 1, _LINES, device="cpu").long().to(update.device)
    if update.lines is not None and update.line_axis != update.long_axis:
        return torch.cat([update.block(i, i + 1).delta for i in chosen.tolist()])
    kept = chosen if update.lines is None else update.lines[chosen]
    part = replace(update, line_axis=update.long_axis, lines=kept)
    # Fewer lines than columns: what was the shorter side is read as the longer one.
    return part.block(0, part.long).delta.T
