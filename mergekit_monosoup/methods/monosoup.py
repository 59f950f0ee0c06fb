"""The merge method `monosoup`."""

from __future__ import annotations

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
from mergekit_monosoup.methods.adapters import AdapterInputs
from mergekit_monosoup.methods.inputs import GroupInputs, validate_recipe
from mergekit_monosoup.methods.parameters import choice, flag, number, optional_number
from mergekit_monosoup.spectral.edit import EditOptions, edit_weight
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
            "exact_lora",
            flag("exact_lora"),
            ParameterScope.SHARED,
            default=True,
            description="true: updates of base+lora come from the factors; false: from the merged weights",
        ),
        ParameterSpec(
            "weight",
            number("weight", "a finite number >= 0", lambda x: x >= 0),
            ParameterScope.NON_BASE,
            default=1.0,
            description="per fine-tuned model: weight in the average, >= 0, normalised",
        ),
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
        exact_lora: bool,
        weight: PerInputValues[float],
        **unknown: Any,
    ) -> Tensor:
        """Return the edited weight in the shape and dtype of the inputs.

        Raises:
            InputError: shapes differ, or a tensor holds NaN, infinity or integers.
            ParameterError: all weights of the average are zero.
        """
        options = EditOptions(energy, mixing, alpha, spectrum)
        weights = weight.values_for(group.non_base)
        if exact_lora and (adapters := AdapterInputs.of(group)):
            return adapters.merged(weights, options, edit=edit, min_relative_update=min_relative_update)
        inputs = GroupInputs.of(group)
        matrix_like = is_matrix_like(tuple(inputs.stored_base.shape))
        if edit and matrix_like and not _is_small(inputs, weights, min_relative_update):
            try:
                result, _record = edit_weight(
                    inputs.stored_base, inputs.stored_tuned, inputs.shares(weights), options
                )
            except NonFiniteError:
                inputs.require_finite()
                raise inputs.overflow() from None
            return inputs.checked(result)
        if alpha == 1 and len(weights) == 1:
            # W0 + (W1 - W0) would round where the two differ by orders of magnitude.
            inputs.require_finite()
            return inputs.sole_finetuned
        return inputs.add_to_base(inputs.mean_update(weights), alpha)


def _is_small(inputs: GroupInputs, weights: Sequence[float], threshold: float) -> bool:
    """Say whether ||dW||_F / ||W0||_F is below the threshold; without a threshold, nothing is."""
    if threshold == 0:
        return False
    base_norm = float(inputs.base.norm())
    update_norm = float(inputs.mean_update(weights).norm())
    return update_norm < threshold * base_norm


MONOSOUP = MonoSoup()
