"""The merge method `monosoup`."""

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
    MIN_RELATIVE_UPDATE,
    SPECTRUM,
    THRESHOLD_SCALE,
    WEIGHT,
    Exemptions,
    SpectralMethod,
)
from mergekit_monosoup.methods.inputs import GroupInputs
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.parameters import choice, optional_choice, optional_number
from mergekit_monosoup.spectral.edit import EditOptions
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.rule import SplitName
from mergekit_monosoup.spectral.spectrum import Backend
from mergekit_monosoup.spectral.split import Split

_SPEC = specification(
    name="monosoup",
    pretty_name="MonoSoup",
    reference_url="https://arxiv.org/abs/2602.09689",
    parameters=(
        ParameterSpec(
            "energy",
            optional_number("energy", "in (0, 1], or absent", lambda x: 0 < x <= 1),
            ParameterScope.SHARED,
            default=None,
            description="fixed energy threshold R in (0, 1]; absent: as `split` says",
        ),
        ParameterSpec(
            "split",
            optional_choice("split", SplitName),
            ParameterScope.SHARED,
            default=None,
            description="effective_rank (the default), energy (0.8 without `energy`) or donoho_gavish",
        ),
        THRESHOLD_SCALE,
        ALPHA,
        ParameterSpec(
            "mixing",
            choice("mixing", Mixing),
            ParameterScope.SHARED,
            default="monosoup",
            description="monosoup, or an ablation: decay, alignment, uniform, high, low",
        ),
        EDIT,
        MATRIX,
        MIN_RELATIVE_UPDATE,
        SPECTRUM,
        EXACT_LORA,
        WEIGHT,
        ROUNDING,
        REPORT,
    ),
)


class MonoSoup(SpectralMethod):
    """Edit the (averaged) update of fine-tuned checkpoints: W = W0 + alpha (l_high dW_high + l_low dW_low).

    arXiv 2602.09689, section 4; several checkpoints are averaged first (its Tables 1 and 4). Tensors
    with fewer than two axes, and those excluded by `edit` or `min_relative_update`, become
    W0 + alpha dW; running statistics of batch normalisation are kept from the fine-tuned model whatever
    alpha is. Works in float32 (float64 for float64) and rounds once.
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
        min_relative_update: float,
        energy: float | None,
        split: SplitName | None,
        threshold_scale: float,
        mixing: Mixing,
        spectrum: Backend,
        **others: Any,
    ) -> Tensor:
        """Return the edited weight.

        Raises:
            InputError: a tensor holds NaN or infinity.
            ParameterError: all weights of the average are zero, or `energy` and `split` disagree.
        """
        rule = Split(split, energy, threshold_scale)
        return self.edited(
            inputs,
            merge,
            started,
            options=EditOptions(rule, mixing, alpha, spectrum),
            exemptions=Exemptions(edit, min_relative_update),
            used={
                "energy": energy,
                "split": split,
                "threshold_scale": threshold_scale,
                "alpha": alpha,
                "mixing": mixing,
            },
            **others,
        )
