"""Where an update's spectrum is split: effective rank, energy threshold or noise threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.spectral.threshold import NoiseEstimate, NoiseThreshold

SplitName = Literal["effective_rank", "energy", "donoho_gavish"]

# R of the paper's fixed threshold.
PAPER_ENERGY = 0.8

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


@dataclass(frozen=True)
class Split:
    """Which of the three rules gives k, and its parameter.

    - `effective_rank`: k = clamp(ceil(exp H), 1, r), the default;
    - `energy`: the smallest k that keeps a share R of the energy;
    - `donoho_gavish`: the number of singular values above tau = scale omega(beta) sigma, sigma being
      estimated from the spectrum (see `threshold`). It may be 0.

    Args:
        name: of the rule; absent, `energy` where R is given and the effective rank elsewhere.
        energy: R in (0, 1]; for the rule `energy` 0.8, the paper's value, where absent.
        threshold_scale: factor on tau, > 0.
        noise: how sigma is estimated.

    Raises:
        ParameterError: a parameter is out of range or belongs to another rule.
    """

    name: SplitName | None = None
    energy: float | None = None
    threshold_scale: float = 1.0
    noise: NoiseEstimate = "median"

    def __post_init__(self) -> None:
        name: SplitName = self.name or ("effective_rank" if self.energy is None else "energy")
        if self.energy is not None and name != "energy":
            raise ParameterError(
                f"energy is {self.energy:g} and split is {name}; give `energy` alone or with `split: energy`"
            )
        energy = PAPER_ENERGY if name == "energy" and self.energy is None else self.energy
        if energy is not None and not 0 < energy <= 1:
            raise ParameterError(f"energy is {energy}; it must be in (0, 1]")
        if not 0 < self.threshold_scale < math.inf:
            raise ParameterError(f"threshold_scale is {self.threshold_scale}; it must be finite and above 0")
        if self.threshold_scale != 1 and name != "donoho_gavish":
            raise ParameterError(
                f"threshold_scale is {self.threshold_scale:g} and split is {name}; it belongs to "
                "`split: donoho_gavish`"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "energy", energy)

    @property
    def title(self) -> str:
        """The rule in a few words."""
        if self.name == "energy":
            return f"energy R = {self.energy:g}"
        if self.name == "effective_rank":
            return "effective rank"
        scale = "" if self.threshold_scale == 1 else f" times {self.threshold_scale:g}"
        return f"Donoho-Gavish threshold{scale}"

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
