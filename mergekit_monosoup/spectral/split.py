"""Where an update's spectrum is split: effective rank, energy threshold or noise threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.spectral.rule import SplitRule
from mergekit_monosoup.spectral.threshold import NoiseThreshold

# Relative excess over an integer that is taken for rounding, in float64 sums of thousands of terms.
_ROUNDING = 1e-10


def effective_rank(singular_values: Tensor) -> float:
    """Return the effective rank of a spectrum.

    erank = exp(H), H = -sum_i p_i ln p_i, p_i = s_i / sum_j s_j (Roy & Vetterli, 2007, eq. 3-5).

    Args:
        singular_values: `[r]`, non-negative, not all zero; evaluated in float64.

    Returns:
        A number in [1, r].
    """
    s = singular_values.double()
    p = s / s.sum()
    entropy = -torch.special.xlogy(p, p).sum()
    return math.exp(float(entropy))


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """Return the smallest k that keeps a share R of the energy.

    sum_{i<=k} s_i^2 >= R * sum_i s_i^2 (MonoSoup, the fixed threshold; the paper's value is R = 0.8).

    Args:
        singular_values: `[r]`, descending; evaluated in float64.
        energy: R in (0, 1].

    Raises:
        ParameterError: R out of range.
    """
    if not 0 < energy <= 1:
        raise ParameterError(f"energy is {energy}; it must be in (0, 1]")
    s = singular_values.double()
    kept = (s / s[0]).square().cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(s))


def rank_index(rank: float, size: int) -> int:
    """Return clamp(ceil(rank), 1, size).

    Rounding in the entropy may lift the effective rank of, say, four equal singular values to
    4 + 1e-15; such an excess does not count.
    """
    return max(1, min(math.ceil(rank * (1 - _ROUNDING)), size))


def split_index(singular_values: Tensor, energy: float | None = None) -> int:
    """Return k, the number of leading singular directions that count as high-energy.

    Without `energy`: k = clamp(ceil(exp H), 1, r), the paper's hyperparameter-free rule.
    With it: the energy threshold. The automatic rule jumps at k = r, where nothing is left over
    and lambda_high becomes 1; this is the paper's rule.

    The third rule, which needs the shape of the matrix as well, is in `Split`.

    Args:
        singular_values: `[r]`, descending, not all zero.
        energy: R in (0, 1], or None for the effective rank.
    """
    if energy is not None:
        return energy_rank(singular_values, energy)
    return rank_index(effective_rank(singular_values), len(singular_values))


class Split(SplitRule):
    """A rule that is applied to spectra."""

    def threshold(self, rows: int, columns: int) -> NoiseThreshold | None:
        """Return the noise threshold of a matrix, None for the other rules."""
        if self.name != "donoho_gavish":
            return None
        return NoiseThreshold(rows, columns, self.threshold_scale, self.noise)

    def index(self, values: Tensor, shape: tuple[int, int]) -> int:
        """Return k of a matrix `[rows, columns]` with the singular values `[q]`; all others are zero."""
        threshold = self.threshold(*shape)
        return split_index(values, self.energy) if threshold is None else threshold.index(values)


EFFECTIVE_RANK = Split()
