"""The threshold of Gavish & Donoho for singular values in noise of unknown level (arXiv 1305.5870)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mergekit_monosoup.spectral.rule import NoiseEstimate

# Quartile of the absolute value of a standard normal variable, by which DG-Hard's second estimate divides.
_NORMAL_QUARTILE = 0.6745


@lru_cache(maxsize=1024)
def omega(beta: float) -> float:
    """Return the optimal hard threshold in units of the noise level, for sides of the ratio beta.

    omega = sqrt(2 (beta + 1) + 8 beta / (beta + 1 + sqrt(beta^2 + 14 beta + 1))), eq. 11; 4 / sqrt 3 for
    square matrices.
    """
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


@lru_cache(maxsize=1024)
def marchenko_pastur_median(beta: float) -> float:
    """Return mu(beta), the median singular value of pure noise of level 1.

    mu^2 is the median of the Marchenko-Pastur law, whose density on [(1 - sqrt beta)^2, (1 + sqrt beta)^2]
    is sqrt((b - x) (x - a)) / (2 pi beta x). With x = 1 + beta - 2 sqrt(beta) cos t it becomes
    2 sin^2 t / (pi x), which is smooth above the median for every beta in (0, 1].
    """
    from scipy.integrate import quad
    from scipy.optimize import brentq

    root = math.sqrt(beta)

    def x(t: float) -> float:
        return (1 - root) ** 2 + 4 * root * math.sin(t / 2) ** 2

    def above(t: float) -> float:
        share, _ = quad(lambda u: 2 * math.sin(u) ** 2 / (math.pi * x(u)), t, math.pi, epsabs=1e-13)
        return float(share)

    return math.sqrt(x(brentq(lambda t: above(t) - 0.5, 0.1, 3.0, xtol=1e-14)))


@dataclass(frozen=True)
class NoiseThreshold:
    """tau = scale omega(beta) sigma of a matrix `[rows, columns]`, sigma being estimated from its spectrum.

    sigma is in units of singular values: of noise with independent entries of standard deviation s it is
    s sqrt(max(rows, columns)). Estimates: `median` is median(s) / mu(beta), the mean of the two middle values
    where r is even; `lower_quarter` is the mean of the lowest quarter over 0.6745 (the second estimate of
    DG-Hard's authors). All r = min(rows, columns) singular values count, zeros as well.
    """

    rows: int
    columns: int
    scale: float = 1.0
    estimate: NoiseEstimate = "median"

    @property
    def factor(self) -> float:
        """Threshold in units of the noise level."""
        return self.scale * omega(min(self.rows, self.columns) / max(self.rows, self.columns))

    def noise(self, values: Tensor) -> float:
        """Return sigma, 0 where the rank is too low for an estimate.

        Args:
            values: the leading singular values `[q]`, descending, float64; the r - q others are zero.
        """
        r = min(self.rows, self.columns)

        def mean(start: int, stop: int) -> float:
            return float(values[start:stop].sum()) / (stop - start)

        if self.estimate == "lower_quarter":
            return mean(r - max(1, r // 4), r) / _NORMAL_QUARTILE
        return mean((r - 1) // 2, r // 2 + 1) / marchenko_pastur_median(r / max(self.rows, self.columns))

    def threshold(self, values: Tensor) -> float:
        """Return tau for these singular values."""
        return self.factor * self.noise(values)

    def index(self, values: Tensor) -> int:
        """Return k, the number of singular values above tau: 0 for pure noise, the rank without noise."""
        return int((values > self.threshold(values)).sum())

    def without_rounding(self, values: Tensor) -> Tensor:
        """Return singular values with those set to zero that a decomposition in float64 cannot tell from it.

        Below max(rows, columns) eps s_1 they are rounding, whose median would be taken for noise.
        """
        floor = max(self.rows, self.columns) * torch.finfo(torch.float64).eps * values[:1]
        return torch.where(values > floor, values, 0.0)
