"""What all merge methods of this package ask of a recipe, said to mergekit once."""

from __future__ import annotations

import copy
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from mergekit_monosoup.methods.inputs import GroupInputs, validate_recipe
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.parameters import choice
from mergekit_monosoup.spectral.storing import Rounding, Storage

REPORT = ParameterSpec(
    "report",
    str | None,
    ParameterScope.SHARED,
    default=None,
    description="file to write one record a tensor to (JSON lines)",
)
ROUNDING = ParameterSpec(
    "rounding",
    choice("rounding", Rounding),
    ParameterScope.SHARED,
    default="nearest",
    description="of the result to 16 bits: nearest, or stochastic (unbiased: small edits survive on average)",
)
# Under this name a run hands its merge to each tensor, beside the parameters of the recipe.
MERGE = "merge"

MethodT = TypeVar("MethodT", bound="UpdateMethod")


class Ambient(Protocol):
    """What keeps the merges of commands that hand over one tensor at a time."""

    def planned(self, spec: MergeMethodSpec, inputs: Sequence[Any], base: Any, name: str | None) -> None:
        """Take note of a recipe, one of its slices, or a tensor that mergekit plans."""

    def merge_of(self, group: TensorGroup) -> Merge:
        """Return the merge that a group belongs to."""


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
    """A merge method that works on the updates W_i - W0 of fine-tuned checkpoints.

    A run hands its `Merge` over with each tensor. Called with all groups in hand, as mergekit's Python
    API does, the groups are one merge: that of `within`, or one of their own. Under mergekit's own
    commands, which do neither, `ambient` knows.
    """

    def __init__(self, ambient: Ambient | None = None) -> None:
        self._ambient = ambient
        self._merge: Merge | None = None

    def within(self: MethodT, merge: Merge) -> MethodT:
        """Return this method as a part of `merge`."""
        bound = copy.copy(self)
        bound._merge, bound._ambient = merge, None
        return bound

    def validate_inputs(self, input_ids: Any, base_id: Any = None, *, group_name: str | None = None) -> None:
        """Refuse a recipe or a tensor group without base, without fine-tuned model, or quantised."""
        validate_recipe(self.spec.name, input_ids, base_id, group_name)
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if self._ambient is not None:
            self._ambient.planned(self.spec, input_ids, base_id, group_name)

    def begin(self, groups: Sequence[TensorGroup], parameters: Sequence[Mapping[str, Any]]) -> None:
        """Look at all groups of a merge before the first is merged; most methods need not."""

    def __call__(
        self,
        groups: Sequence[TensorGroup],
        /,
        *,
        parameters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Merge groups that are all in hand."""
        merge = self._merge or Merge()
        groups = tuple(groups)
        # The groups validate their inputs one by one; no command's plan is behind them.
        bound = self.within(merge)
        given = [{**p, MERGE: merge} for p in bound._bind_parameters(groups, parameters or {})]
        bound.begin(groups, given)
        result: tuple[Tensor, ...] = bound._execute_resolved(groups, given, **options)
        if merge is not self._merge:
            merge.close()
        return result

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        merge: Merge | None = None,
        rounding: Rounding = "nearest",
        **parameters: Any,
    ) -> Tensor:
        """Return the merged tensor in the shape and dtype of the inputs, bfloat16 for float8.

        Raises:
            InputError: shapes differ, or a tensor holds NaN, infinity or integers.
            ParameterError: the parameters do not go with this group.
        """
        if merge is None:
            merge = self._ambient.merge_of(group) if self._ambient is not None else Merge()
        started, name = time.perf_counter(), group.metadata.name or ""
        inputs = GroupInputs.of(group, Storage(rounding, name, merge.stored_dtypes.get(name)))
        return self.merged(inputs, merge, started, **parameters)

    @abstractmethod
    def merged(
        self, inputs: GroupInputs, merge: Merge, started: float, /, *args: Any, **parameters: Any
    ) -> Tensor:
        """Return the merged tensor and record in `merge` what was done.

        Args:
            inputs: the checked group.
            merge: what it is a part of.
            started: `time.perf_counter()` when work on it began.
            parameters: of the method.
        """
