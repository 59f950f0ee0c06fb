"""The merge method `monosoup`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from mergekit.merge_methods.base import (
    ParameterScope,
    ParameterSpec,
    PerInputValues,
)
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.methods.adapters import EXACT_LORA, AdapterInputs
from mergekit_monosoup.methods.contract import REPORT, UpdateMethod, specification
from mergekit_monosoup.methods.inputs import GroupInputs
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.outcomes import MergedWeight, below
from mergekit_monosoup.methods.parameters import choice, flag, number, optional_number
from mergekit_monosoup.report.schema import Action
from mergekit_monosoup.spectral.edit import EditOptions, EditRecord, MatrixRecord, edit_weight
from mergekit_monosoup.spectral.matrix import Layout, MatrixView, choose_view
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.spectrum import Backend

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
            "matrix",
            choice("matrix", Layout),
            ParameterScope.SHARED,
            default="auto",
            description="reading of three or more axes: auto, flatten (first axis against the rest), stack",
        ),
        ParameterSpec(
            "min_relative_update",
            number("min_relative_update", "a finite number >= 0", lambda x: x >= 0),
            ParameterScope.SHARED,
            default=0.0,
            description="below this ||dW||/||W0|| a matrix is not edited, >= 0",
        ),
        ParameterSpec(
            "spectrum",
            choice("spectrum", Backend),
            ParameterScope.SHARED,
            default="auto",
            description="how the spectrum is computed: auto, gram or svd",
        ),
        EXACT_LORA,
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


class MonoSoup(UpdateMethod):
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
        matrix: Layout,
        min_relative_update: float,
        energy: float | None,
        mixing: Mixing,
        spectrum: Backend,
        exact_lora: bool,
        weight: PerInputValues[float],
        report: str | None,
    ) -> Tensor:
        """Return the edited weight.

        Raises:
            InputError: a tensor holds NaN or infinity.
            ParameterError: all weights of the average are zero.
        """
        name = inputs.group.metadata.name
        if is_running_statistic(name):
            # Statistics describe the data seen in training; a share of them describes nothing.
            alpha = 1.0
        weights = weight.values_for(inputs.group.non_base)
        options = EditOptions(energy, mixing, alpha, spectrum)
        view = choose_view(tuple(inputs.stored_base.shape), name, matrix)
        adapters = AdapterInputs.of(inputs, merge) if exact_lora else None
        if adapters is not None:
            merged = adapters.merged(weights, options, view, edit, min_relative_update)
        elif not view.decomposes or not edit:
            reason = "edit: false" if view.decomposes else "not a matrix"
            merged = _unedited(inputs, weights, alpha, reason)
        elif view.shape[0] == 1 or min_relative_update == 0:
            merged = _edited(inputs, weights, options, view, min_relative_update)
        else:
            # Each matrix of a stack for itself, as if it had a tensor of its own.
            merged = _edited_one_by_one(inputs, weights, options, view, min_relative_update)
        merge.record(
            inputs.group,
            self.spec,
            merged,
            report=report,
            weights=weights,
            started=started,
            parameters={"energy": energy, "alpha": alpha, "mixing": mixing, "matrix": matrix},
        )
        return merged.weight


def is_running_statistic(name: str | None) -> bool:
    """Say whether this is a mean or variance that batch normalisation has measured."""
    return name is not None and name.endswith(("running_mean", "running_var"))


def _edited(
    inputs: GroupInputs, weights: Sequence[float], options: EditOptions, view: MatrixView, threshold: float
) -> MergedWeight:
    """Edit a weight, or leave it unedited where its update is below the threshold."""
    norm: float | None = None
    if threshold > 0:
        norm = float(inputs.mean_update(weights).norm())
        if norm < threshold * float(inputs.base.norm()):
            merged = _unedited(inputs, weights, options.alpha, below(threshold))
            return replace(merged, update_norm=norm)
    try:
        result, record = edit_weight(
            inputs.stored_base, inputs.stored_tuned, inputs.shares(weights), options, view
        )
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
        part = replace(inputs, group=replace(inputs.group, entries=entries))
        merged = _edited(part, weights, options, single, threshold)
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
    result = inputs.add_to_base(inputs.mean_update(weights), alpha)
    return MergedWeight(result, "kept" if len(weights) == 1 else "averaged", reason)
