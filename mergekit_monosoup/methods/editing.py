"""What the methods that edit the update of one tensor share: which tensors are left alone, and the edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.merge_methods.base import ParameterScope, ParameterSpec, PerInputValues
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.methods.adapters import AdapterInputs
from mergekit_monosoup.methods.contract import UpdateMethod
from mergekit_monosoup.methods.inputs import GroupInputs
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.outcomes import MergedWeight, below
from mergekit_monosoup.methods.parameters import choice, flag, number
from mergekit_monosoup.report.schema import Action
from mergekit_monosoup.spectral.edit import EditOptions, edit_weight
from mergekit_monosoup.spectral.matrix import Layout, MatrixView, choose_view
from mergekit_monosoup.spectral.parts import PartsStore, find_parts, put_together
from mergekit_monosoup.spectral.record import EditRecord, MatrixRecord
from mergekit_monosoup.spectral.spectrum import Backend

ALPHA = ParameterSpec(
    "alpha",
    number("alpha", "a finite number >= 0", lambda x: x >= 0),
    ParameterScope.SHARED,
    default=1.0,
    description="Wise-FT factor on the edited update, >= 0",
)
EDIT = ParameterSpec(
    "edit",
    flag("edit"),
    ParameterScope.SHARED,
    default=True,
    description="false: keep the (averaged) fine-tuned value, scaled by alpha",
)
MATRIX = ParameterSpec(
    "matrix",
    choice("matrix", Layout),
    ParameterScope.SHARED,
    default="auto",
    description="reading of three or more axes: auto, flatten (first axis against the rest), stack",
)
MIN_RELATIVE_UPDATE = ParameterSpec(
    "min_relative_update",
    number("min_relative_update", "a finite number >= 0", lambda x: x >= 0),
    ParameterScope.SHARED,
    default=0.0,
    description="below this ||dW||/||W0|| a matrix is not edited, >= 0",
)
SPECTRUM = ParameterSpec(
    "spectrum",
    choice("spectrum", Backend),
    ParameterScope.SHARED,
    default="auto",
    description="how the spectrum is computed: auto, gram or svd",
)
THRESHOLD_SCALE = ParameterSpec(
    "threshold_scale",
    number("threshold_scale", "a finite number > 0", lambda x: x > 0),
    ParameterScope.SHARED,
    default=1.0,
    description="factor on the Donoho-Gavish threshold, > 0",
)
WEIGHT = ParameterSpec(
    "weight",
    number("weight", "a finite number >= 0", lambda x: x >= 0),
    ParameterScope.NON_BASE,
    default=1.0,
    description="per fine-tuned model: weight in the average, >= 0, normalised",
)


@dataclass(frozen=True)
class Exemptions:
    """Which matrices are not edited: none where `edit` is false, those of few entries or small updates."""

    edit: bool = True
    min_relative_update: float = 0.0
    min_entries: int = 0

    def reason(self, view: MatrixView) -> str:
        """Return why a tensor is not edited whatever its values are; empty where it is."""
        if not view.decomposes:
            return "not a matrix"
        if not self.edit:
            return "edit: false"
        if math.prod(view.shape[1:]) < self.min_entries:
            return f"fewer than {self.min_entries} entries"
        return ""


class SpectralMethod(UpdateMethod):
    """A merge method that splits the (averaged) update of each matrix and mixes the two parts."""

    def edited(
        self,
        inputs: GroupInputs,
        merge: Merge,
        started: float,
        *,
        options: EditOptions,
        exemptions: Exemptions,
        matrix: Layout,
        exact_lora: bool,
        weight: PerInputValues[float],
        report: str | None,
        used: Mapping[str, Any],
    ) -> Tensor:
        """Return the edited weight and record it.

        Args:
            inputs, merge, started: as `merged` has them.
            options: split, mixing and factor.
            exemptions: which matrices are left alone.
            matrix, exact_lora, weight, report: parameters of the recipe.
            used: parameters for the record.
        """
        name = inputs.group.metadata.name
        if is_running_statistic(name):
            # Statistics describe the data seen in training; a share of them describes nothing.
            options = replace(options, alpha=1.0)
        options = replace(options, storage=inputs.storage)
        weights = weight.values_for(inputs.group.non_base)
        view = choose_view(tuple(inputs.stored_base.shape), name, matrix)
        reason = exemptions.reason(view)
        threshold = exemptions.min_relative_update
        adapters = AdapterInputs.of(inputs, merge) if exact_lora else None
        if adapters is not None:
            merged = adapters.merged(weights, options, view, reason, threshold)
        elif reason:
            merged = _unedited(inputs, weights, options.alpha, reason)
        elif view.shape[0] == 1 or threshold == 0:
            merged = _edited(inputs, weights, options, view, threshold, merge.parts)
        else:
            # Each matrix of a stack for itself, as if it had a tensor of its own.
            merged = _edited_one_by_one(inputs, weights, options, view, threshold)
        merge.record(
            inputs.group,
            self.spec,
            merged,
            report=report,
            weights=weights,
            started=started,
            parameters={**used, "matrix": matrix, "rounding": inputs.storage.rounding},
        )
        return merged.weight


def is_running_statistic(name: str | None) -> bool:
    """Say whether this is a mean or variance that batch normalisation has measured."""
    return name is not None and name.endswith(("running_mean", "running_var"))


def _edited(
    inputs: GroupInputs,
    weights: Sequence[float],
    options: EditOptions,
    view: MatrixView,
    threshold: float,
    parts: PartsStore | None = None,
) -> MergedWeight:
    """Edit a weight, or leave it unedited where its update is below the threshold."""
    norm: float | None = None
    if threshold > 0:
        norm = float(inputs.mean_update(weights).norm())
        if norm < threshold * float(inputs.base.norm()):
            merged = _unedited(inputs, weights, options.alpha, below(threshold))
            return replace(merged, update_norm=norm)
    shares = inputs.shares(weights)
    stored = inputs.stored_base, inputs.stored_tuned, shares
    try:
        # Random digits go by the order in which an edit writes its blocks.
        if parts is not None and options.storage.rounding == "nearest":
            rule = f"{options.split!r} {options.spectrum} {view.shape} {shares}"
            found = parts.parts(inputs.storage.name, rule, lambda: find_parts(*stored, options, view))
            result, record = put_together(*stored, found, options, view), EditRecord((), view.kind)
        else:
            result, record = edit_weight(*stored, options, view)
    except NonFiniteError:
        inputs.require_finite()
        raise inputs.overflow() from None
    return MergedWeight(inputs.checked(result), "edited", edit=record, update_norm=norm)


def _edited_one_by_one(
    inputs: GroupInputs, weights: Sequence[float], options: EditOptions, view: MatrixView, threshold: float
) -> MergedWeight:
    """Like `_edited` for each matrix of a stack; the record has those that were edited."""
    out = torch.empty_like(
        inputs.stored_base, dtype=inputs.output_dtype, memory_format=torch.contiguous_format
    )
    single = choose_view(view.shape[1:])
    records: list[MatrixRecord] = []
    norms: list[float] = []
    stacks = [view.of(entry.tensor) for entry in inputs.group.entries]
    for index, result in enumerate(view.of(out)):
        entries = tuple(
            replace(entry, tensor=stack[index])
            for entry, stack in zip(inputs.group.entries, stacks, strict=True)
        )
        storage = replace(inputs.storage, name=f"{inputs.storage.name}[{index}]")
        part = replace(inputs, group=replace(inputs.group, entries=entries), storage=storage)
        merged = _edited(part, weights, replace(options, storage=storage), single, threshold)
        result.copy_(merged.weight)
        records += merged.edit.matrices if merged.edit is not None else ()
        norms.append(merged.update_norm or 0.0)
    norm = math.hypot(*norms)
    if records:
        return MergedWeight(out, "edited", edit=EditRecord(tuple(records), view.kind), update_norm=norm)
    action: Action = "kept" if len(weights) == 1 else "averaged"
    return MergedWeight(out, action, below(threshold), update_norm=norm)


def _unedited(inputs: GroupInputs, weights: Sequence[float], alpha: float, reason: str) -> MergedWeight:
    if len(weights) == 1 and alpha == 1:
        # W0 + (W1 - W0) would round where the two differ by orders of magnitude.
        inputs.require_finite()
        return MergedWeight(inputs.sole_finetuned, "kept", reason)
    stored = inputs.add_to_base(inputs.mean_update(weights), alpha)
    action: Action = "kept" if len(weights) == 1 else "averaged"
    return MergedWeight(stored.weight, action, reason, survival=stored.survival)
