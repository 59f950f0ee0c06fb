"""The merge method `monosoup`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    PerInputValues,
    TensorGroup,
)
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.methods.inputs import GroupInputs, validate_recipe
from mergekit_monosoup.methods.parameters import choice, flag, number, optional_number
from mergekit_monosoup.methods.reporting import REPORT, note
from mergekit_monosoup.report.schema import Action
from mergekit_monosoup.spectral.edit import EditOptions, EditRecord, edit_weight
from mergekit_monosoup.spectral.matrix import is_matrix_like
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.spectrum import Backend

_SPEC = MergeMethodSpec(
    name="monosoup",
    pretty_name="MonoSoup",
    reference_url="https://arxiv.org/abs/2602.09689",
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    parameters=(
        ParameterSpec(
            "energy",
            optional_number("energy", "in (0, 1], or absent", lambda x: 0 < x <= 1),
            ParameterScope.SHARED,
            default=None,
            description="fixed energy threshold R in (0, 1]; absent: effective rank",
        ),
        ParameterSpec(
            "alpha",
            number("alpha", "a finite number >= 0", lambda x: x >= 0),
            ParameterScope.SHARED,
            default=1.0,
            description="Wise-FT factor on the edited update, >= 0",
        ),
        ParameterSpec(
            "mixing",
            choice("mixing", Mixing),
            ParameterScope.SHARED,
            default="monosoup",
            description="monosoup, or an ablation: decay, alignment, uniform, high, low",
        ),
        ParameterSpec(
            "edit",
            flag("edit"),
            ParameterScope.SHARED,
            default=True,
            description="false: keep the (averaged) fine-tuned value, scaled by alpha",
        ),
        ParameterSpec(
            "min_relative_update",
            number("min_relative_update", "a finite number >= 0", lambda x: x >= 0),
            ParameterScope.SHARED,
            default=0.0,
            description="below this ||dW||/||W0|| the tensor is not edited, >= 0",
        ),
        ParameterSpec(
            "spectrum",
            choice("spectrum", Backend),
            ParameterScope.SHARED,
            default="auto",
            description="how the spectrum is computed: auto, gram or svd",
        ),
        ParameterSpec(
            "weight",
            number("weight", "a finite number >= 0", lambda x: x >= 0),
            ParameterScope.NON_BASE,
            default=1.0,
            description="per fine-tuned model: weight in the average, >= 0, normalised",
        ),
        REPORT,
    ),
)


class MonoSoup(GroupMergeMethod):
    """Edit the (averaged) update of fine-tuned checkpoints: W = W0 + alpha (l_high dW_high + l_low dW_low).

    arXiv 2602.09689, section 4; several checkpoints are averaged first (its Tables 1 and 4). Tensors
    with fewer than two axes, and those excluded by `edit` or `min_relative_update`, become
    W0 + alpha dW. Works in float32 (float64 for float64) and rounds once.
    """

    spec = _SPEC

    def validate_inputs(self, input_ids: Any, base_id: Any = None, *, group_name: str | None = None) -> None:
        """Refuse a recipe or a tensor group without base, without fine-tuned model, or quantised."""
        validate_recipe(self.spec.name, input_ids, base_id, group_name)
        super().validate_inputs(input_ids, base_id, group_name=group_name)

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        energy: float | None,
        alpha: float,
        mixing: Mixing,
        edit: bool,
        min_relative_update: float,
        spectrum: Backend,
        weight: PerInputValues[float],
        report: str | None,
        **unknown: Any,
    ) -> Tensor:
        """Return the edited weight in the shape and dtype of the inputs.

        Raises:
            InputError: shapes differ, or a tensor holds NaN, infinity or integers.
            ParameterError: all weights of the average are zero.
        """
        started = time.perf_counter()
        inputs = GroupInputs.of(group)
        weights = weight.values_for(group.non_base)
        action, reason, norm = _decide(inputs, weights, edit, min_relative_update)
        record: EditRecord | None = None
        if action == "edited":
            result, record = _edited(inputs, weights, EditOptions(energy, mixing, alpha, spectrum))
        elif action == "kept" and alpha == 1:
            # W0 + (W1 - W0) would round where the two differ by orders of magnitude.
            inputs.require_finite()
            result = inputs.sole_finetuned
        else:
            result = inputs.add_to_base(inputs.mean_update(weights), alpha)
        used = {"energy": energy, "alpha": alpha, "mixing": mixing}
        note(
            group,
            self.spec.name,
            action,
            reason,
            report=report,
            update_norm=norm,
            edit=record,
            weights=weights,
            started=started,
            parameters={k: v for k, v in used.items() if v != _DEFAULTS[k]},
        )
        return result


def _edited(inputs: GroupInputs, weights: Sequence[float], options: EditOptions) -> tuple[Tensor, EditRecord]:
    try:
        result, record = edit_weight(inputs.stored_base, inputs.stored_tuned, inputs.shares(weights), options)
    except NonFiniteError:
        inputs.require_finite()
        raise inputs.overflow() from None
    return inputs.checked(result), record


def _decide(
    inputs: GroupInputs, weights: Sequence[float], edit: bool, min_relative_update: float
) -> tuple[Action, str, float | None]:
    """Say what becomes of a tensor and why, with ||dW||_F where the decision needed it."""
    shape = tuple(inputs.stored_base.shape)
    norm = None
    if not is_matrix_like(shape):
        reason = "fewer than two axes" if len(shape) < 2 else "no entries"
    elif not edit:
        reason = "edit: false"
    else:
        if min_relative_update == 0:
            return "edited", "", None
        norm = float(inputs.mean_update(weights).norm())
        if norm >= min_relative_update * float(inputs.base.norm()):
            return "edited", "", norm
        reason = f"relative update below {min_relative_update:g}"
    return ("kept" if len(weights) == 1 else "averaged"), reason, norm


_DEFAULTS = {p.name: p.default for p in _SPEC.parameters}
MONOSOUP = MonoSoup()
