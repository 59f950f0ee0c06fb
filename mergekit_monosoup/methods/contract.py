"""What all merge methods of this package ask of a recipe, said to mergekit once."""

from __future__ import annotations

from typing import Any

from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterSpec,
)

from mergekit_monosoup.methods.inputs import validate_recipe


def specification(
    name: str, pretty_name: str, reference_url: str, parameters: tuple[ParameterSpec, ...]
) -> MergeMethodSpec:
    """Return the specification of a method that needs the base and at least one fine-tuned checkpoint.

    The contract holds for single tensors as well, of which fewer checkpoints than the recipe names may
    do; an optional tensor that only the base has passes through.
    """
    return MergeMethodSpec(
        name=name,
        pretty_name=pretty_name,
        reference_url=reference_url,
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        parameters=parameters,
    )


class UpdateMethod(GroupMergeMethod):
    """A merge method that works on the updates W_i - W0 of fine-tuned checkpoints."""

    def validate_inputs(self, input_ids: Any, base_id: Any = None, *, group_name: str | None = None) -> None:
        """Refuse a recipe or a tensor group without base, without fine-tuned model, or quantised."""
        validate_recipe(self.spec.name, input_ids, base_id, group_name)
        super().validate_inputs(input_ids, base_id, group_name=group_name)
