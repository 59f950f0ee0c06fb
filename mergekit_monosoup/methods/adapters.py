"""Groups with `base+adapter` inputs: updates by the factors instead of the merged weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from torch import Tensor

from mergekit_monosoup.lora.factors import LowRankUpdate, edit_factors, mean_of
from mergekit_monosoup.methods.inputs import GroupInputs
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.outcomes import MergedWeight, below
from mergekit_monosoup.methods.parameters import flag
from mergekit_monosoup.report.schema import Action
from mergekit_monosoup.spectral.edit import EditOptions, edit_update
from mergekit_monosoup.spectral.matrix import MatrixView

if TYPE_CHECKING:
    from mergekit_monosoup.lora.exact import ExactUpdate


EXACT_LORA = ParameterSpec(
    "exact_lora",
    flag("exact_lora"),
    ParameterScope.SHARED,
    default=True,
    description="true: the update of base+lora is taken from the factors, not from the merge",
)


class AdapterInputs:
    """The updates of a group, those of adapters on the base by their factors.

    Args:
        inputs: the checked group.
        exact: for each fine-tuned input, its update by the factors, or None for a checkpoint.
    """

    def __init__(self, inputs: GroupInputs, exact: Sequence[ExactUpdate | None]) -> None:
        self._inputs = inputs
        self._exact = exact

    @classmethod
    def of(cls, inputs: GroupInputs, merge: Merge) -> AdapterInputs | None:
        """Return the inputs, or None where no input is an adapter whose factors can be used.

        Raises:
            AdapterError: an adapter is damaged or of another base, or its merged copy is of another one.
        """
        group = inputs.group
        if not any(getattr(entry.id, "lora", None) for entry in group.non_base):
            return None
        inputs.require_finite()
        exact = [merge.adapters.exact_update(e, group.base, group.metadata) for e in group.non_base]
        return cls(inputs, exact) if any(update is not None for update in exact) else None

    def update(self, index: int) -> Tensor:
        """Return dW of one fine-tuned input in the dtype of the computation."""
        exact, base = self._exact[index], self._inputs.base
        if exact is not None:
            return exact.materialise(base)
        return self._inputs.stored_tuned[index].to(base.dtype) - base

    def mean_update(self, shares: Sequence[float]) -> Tensor:
        """Return dW = sum_i w_i dW_i, the weights summing to 1, in the dtype of the computation."""
        dw = self.update(0) * shares[0]
        for index, share in enumerate(shares[1:], start=1):
            dw = dw.add_(self.update(index), alpha=share)
        return dw

    def mean_factors(self, shares: Sequence[float]) -> LowRankUpdate | None:
        """Return dW = sum_i w_i dW_i as one low-rank update, or None where it is not one."""
        if not all(update is not None and update.dense is None for update in self._exact):
            return None
        parts = [
            (update.low_rank, share)
            for update, share in zip(self._exact, shares, strict=True)
            if update is not None and update.low_rank is not None
        ]
        if len(self._exact) == 1 and parts:
            return parts[0][0]
        return mean_of([part for part, _ in parts], [share for _, share in parts]) if parts else None

    def as_checkpoints(self) -> GroupInputs:
        """Return the group with W0 + dW in the dtype of the computation for every input, W0 alike."""
        base = self._inputs.base
        group = self._inputs.group
        tuned = iter([base + self.update(index) for index in range(len(group.non_base))])
        entries = tuple(replace(e, tensor=base if e.is_base else next(tuned)) for e in group.entries)
        return replace(self._inputs, group=replace(group, entries=entries))

    @property
    def untouched(self) -> bool:
        """Whether adapters are the only inputs, and none of them changes this tensor."""
        return all(update is not None and update.is_zero for update in self._exact)

    def merged(
        self,
        weights: Sequence[float],
        options: EditOptions,
        view: MatrixView,
        reason: str,
        min_relative_update: float,
    ) -> MergedWeight:
        """Return W0 + alpha * (edited) mean update, rounded once to the dtype of the inputs.

        A tensor that no adapter touches keeps the bits of the base. Where all updates are low-rank, the
        spectrum is that of the factors; where checkpoints take part, that of the mean update.

        Args:
            weights: of the average.
            options: of the edit.
            view: how the tensor is read as matrices.
            reason: why it is not edited; empty where it is.
            min_relative_update: parameter of the recipe.
        """
        inputs, shares = self._inputs, self._inputs.shares(weights)
        action: Action = "kept" if len(shares) == 1 else "averaged"
        if self.untouched:
            return MergedWeight(inputs.stored_base, action, "no adapter touches it", update_norm=0.0)
        base = inputs.base
        if not reason and min_relative_update:
            small = float(self.mean_update(shares).norm()) < min_relative_update * float(base.norm())
            reason = below(min_relative_update) if small else ""
        if reason:
            dw = self.mean_update(shares)
            stored = inputs.add_to_base(dw, options.alpha, exact=True)
            return MergedWeight(stored.weight, action, reason, update_norm=float(dw.norm()))
        factors = self.mean_factors(shares)
        if factors is not None:
            edited, record = edit_factors(factors, split=options.split, mixing=options.mixing)
            dw = edited.materialise(base.dtype).to(base.device)
        else:
            dw, record = edit_update(
                self.mean_update(shares),
                split=options.split,
                mixing=options.mixing,
                spectrum=options.spectrum,
                view=view,
            )
        stored = inputs.add_to_base(dw, options.alpha, exact=True)
        return MergedWeight(stored.weight, "edited", edit=record)


def with_exact_weights(inputs: GroupInputs, merge: Merge) -> GroupInputs:
    """Return a group with W0 + dW, unrounded, for the inputs that are adapters on its base.

    Raises:
        AdapterError: as `AdapterInputs.of`.
    """
    adapters = AdapterInputs.of(inputs, merge)
    return inputs if adapters is None else adapters.as_checkpoints()
