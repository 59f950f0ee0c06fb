"""Which rule splits a spectrum, and its parameters; without torch, so that plans can name it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mergekit_monosoup.errors import ParameterError

SplitName = Literal["effective_rank", "energy", "donoho_gavish"]
NoiseEstimate = Literal["median", "lower_quarter"]

# R of the paper's fixed threshold.
PAPER_ENERGY = 0.8


@dataclass(frozen=True)
class SplitRule:
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
