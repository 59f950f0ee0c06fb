"""The merge method `dg_hard`."""

from __future__ import annotations

from typing import Any

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from torch import Tensor

from mergekit_monosoup.methods.adapters import EXACT_LORA
from mergekit_monosoup.methods.contract import REPORT, ROUNDING, specification
from mergekit_monosoup.methods.editing import (
    ALPHA,
    EDIT,
    MATRIX,
    SPECTRUM,
    THRESHOLD_SCALE,
    WEIGHT,
    Exemptions,
    SpectralMethod,
)
from mergekit_monosoup.methods.inputs import GroupInputs
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.parameters import choice, whole_number
from mergekit_monosoup.spectral.edit import EditOptions
from mergekit_monosoup.spectral.rule import NoiseEstimate
from mergekit_monosoup.spectral.spectrum import Backend
from mergekit_monosoup.spectral.split import Split

_SPEC = specification(
    name="dg_hard",
    pretty_name="DG-Hard",
    reference_url="https://arxiv.org/abs/2605.20296",
    parameters=(
        THRESHOLD_SCALE,
        ParameterSpec(
            "noise",
            choice("noise", NoiseEstimate),
            ParameterScope.SHARED,
            default="median",
            description="estimate of the noise level: median, or lower_quarter of the singular values",
        ),
        ParameterSpec(
            "min_entries",
            whole_number("min_entries", "a whole number >= 0", lambda x: x >= 0),
            ParameterScope.SHARED,
            default=0,
            description="matrices with fewer entries are not edited, >= 0",
        ),
        ALPHA,
        EDIT,
        MATRIX,
        SPECTRUM,
        EXACT_LORA,
        WEIGHT,
        ROUNDING,
        REPORT,
    ),
)


class DGHard(SpectralMethod):
    """Keep the singular directions above the noise: W = W0 + alpha sum_{s_i > tau} s_i u_i v_i^T.

    tau = scale omega(beta) sigma, the threshold of Gavish & Donoho (arXiv 1305.5870), with sigma estimated
    from the spectrum itself; DG-Hard, arXiv 2605.20296. An update without any direction above it goes: W0.
    Tensors with fewer than two axes, and those excluded by `edit` or `min_entries`, become W0 + alpha dW.
    """

    spec = _SPEC

    def merged(
        self,
        inputs: GroupInputs,
        merge: Merge,
        started: float,
        /,
        *,
        alpha: float,
        edit: bool,
        min_entries: int,
        threshold_scale: float,
        noise: NoiseEstimate,
        spectrum: Backend,
        **others: Any,
    ) -> Tensor:
        """Return the edited weight.

        Raises:
            InputError: a tensor holds NaN or infinity.
            ParameterError: all weights of the average are zero.
        """
        rule = Split("donoho_gavish", threshold_scale=threshold_scale, noise=noise)
        return self.edited(
            inputs,
            merge,
            started,
            options=EditOptions(rule, "high", alpha, spectrum),
            exemptions=Exemptions(edit, min_entries=min_entries),
            used={"threshold_scale": threshold_scale, "noise": noise, "alpha": alpha},
            **others,
        )
