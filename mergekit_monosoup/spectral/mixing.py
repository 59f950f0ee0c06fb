"""The two coefficients of an edit, read off the spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Mixing = Literal["monosoup", "decay", "alignment", "uniform", "high", "low"]


@dataclass(frozen=True)
class Coefficients:
    """What the split of one matrix says: decay, alignment and the two mixing factors."""

    rho: float
    cos_alpha: float
    energy_kept: float
    lambda_low: float
    lambda_high: float


def mixing_coefficients(singular_values: Tensor, k: int, mixing: Mixing) -> Coefficients:
    """Return rho, cos alpha and the factors of dW_high and dW_low.

    rho = (s_{k+1} / s_1)^2, and 0 when k = r; cos alpha = ||dW_low||_F / ||dW||_F
    = sqrt(sum_{i>k} s_i^2 / sum_i s_i^2); lambda_low = rho + (1 - rho) cos alpha;
    lambda_high = 1 - lambda_low (MonoSoup, section 4). The others are the paper's ablations
    (Fig. 6, App. G): `decay` lambda_low = rho; `alignment` lambda_low = cos alpha; `uniform` both 1/2;
    `high` (1, 0); `low` (0, 1). At k = 0 all is low: rho = cos alpha = 1, so that `monosoup`, `decay` and
    `alignment` leave the update as it is.

    Args:
        singular_values: `[r]`, descending, not all zero; evaluated in float64.
        k: split index, 0 <= k <= r.
        mixing: which rule gives the factors.
    """
    # Relative to s_1 before squaring: updates of 1e-30 must not vanish. The tail is summed itself;
    # 1 - P_k would cancel.
    energies = (singular_values.double() / singular_values[0].double()).square()
    low, high = float(energies[k:].sum()), float(energies[:k].sum())
    rho = float(energies[k]) if k < len(energies) else 0.0
    cos_alpha = math.sqrt(low / (low + high))
    lambda_low, lambda_high = mix(rho, cos_alpha, mixing)
    return Coefficients(rho, cos_alpha, high / (low + high), lambda_low, lambda_high)


def mix(rho: float, cos_alpha: float, mixing: Mixing) -> tuple[float, float]:
    """Return lambda_low and lambda_high; see `mixing_coefficients`."""
    match mixing:
        case "monosoup":
            low = rho + (1 - rho) * cos_alpha
        case "decay":
            low = rho
        case "alignment":
            low = cos_alpha
        case "uniform":
            low = 0.5
        case "high":
            low = 0.0
        case "low":
            low = 1.0
    return low, 1 - low
