"""The merge method `sfgs`: Similarity-Filtered Greedy Soup."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods.base import (
    ParameterScope,
    ParameterSpec,
    PerInputValues,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from torch import Tensor

from mergekit_monosoup.alignment.average import towards_average
from mergekit_monosoup.alignment.selection import DEFAULT_THRESHOLD, Layers, considered_in_order
from mergekit_monosoup.alignment.soup_decision import SoupDecision, in_words, soup_decision
from mergekit_monosoup.alignment.stored import Alignment, Refine, align, align_loaders, loader_for
from mergekit_monosoup.errors import ConfigurationError, NonFiniteError, ParameterError
from mergekit_monosoup.methods.adapters import EXACT_LORA, with_exact_weights
from mergekit_monosoup.methods.contract import MERGE, REPORT, ROUNDING, UpdateMethod, specification
from mergekit_monosoup.methods.inputs import GroupInputs
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.outcomes import MergedWeight
from mergekit_monosoup.methods.parameters import choice, number, optional_number

LOG = logging.getLogger(__name__)

_SPEC = specification(
    name="sfgs",
    pretty_name="Similarity-Filtered Greedy Soup",
    reference_url="https://arxiv.org/abs/2602.09689",
    parameters=(
        ParameterSpec(
            "threshold",
            number("threshold", "in [-1, 1]", lambda x: -1 <= x <= 1),
            ParameterScope.SHARED,
            default=DEFAULT_THRESHOLD,
            description="a candidate's average cosine to the soup must exceed it, in [-1, 1]",
        ),
        ParameterSpec(
            "layers",
            choice("layers", Layers),
            ParameterScope.SHARED,
            default="matrices",
            description="which tensors the average is over: matrices (two or more axes) or all",
        ),
        ParameterSpec(
            "score",
            optional_number("score", "a finite number, or absent", lambda _: True),
            ParameterScope.NON_BASE,
            default=None,
            description="per fine-tuned model: highest first; absent: in the order listed",
        ),
        EXACT_LORA,
        ROUNDING,
        REPORT,
    ),
)


class SimilarityFilteredGreedySoup(UpdateMethod):
    """Average the checkpoints whose updates point the soup's way: W = W0 + mean of the taken updates.

    One decision for the whole model (arXiv 2602.09689): a candidate is taken if the average over
    the tensors of cos(dW_candidate, dW_soup) exceeds the threshold. It is taken on the tensors as
    they are stored, before `dtype:` and `tokenizer:` change them; a tensor counts if all checkpoints
    store it in the same shape. The average works in float32 (float64 for float64) and rounds once.
    """

    spec = _SPEC

    def begin(self, groups: Sequence[TensorGroup], parameters: Sequence[Mapping[str, Any]]) -> None:
        """Take the decision over all groups of a merge."""
        for group, given in zip(groups, parameters, strict=True):
            merge: Merge = given[MERGE]
            self._decide(group, merge, given, lambda: _align_groups(groups, parameters[0]["layers"]))

    def merged(
        self, inputs: GroupInputs, merge: Merge, started: float, /, *, report: str | None, **parameters: Any
    ) -> Tensor:
        """Return W0 + the mean of the taken updates.

        Raises:
            ParameterError: `threshold`, `layers` or `score` is not the same for all tensors, or some
                checkpoints have a score and others have none.
            MissingTensorError: no tensor is comparable.
            InputError: a tensor holds NaN or infinity.
        """
        group, exact = inputs.group, parameters["exact_lora"]

        def read_checkpoints() -> Alignment:
            if merge.align is not None:
                found: Alignment = merge.align(parameters["layers"], exact)
                return found
            models = _finetuned(merge, group)
            loaders = [loader_for(model) for model in models]
            refine = refinement(group.base.id, models, merge) if exact else None
            device = group.entries[0].tensor.device
            return align_loaders(loader_for(group.base.id), loaders, parameters["layers"], device, refine)

        begun = merge.decision is not None
        taken = self._decide(group, merge, parameters, read_checkpoints).taken
        if not begun:
            # The decision is the whole merge's and not this tensor's.
            started = time.perf_counter()
        entries = tuple(entry for entry in group.non_base if entry.id in taken)
        stored = replace(inputs, group=TensorGroup((group.base, *entries), group.metadata))
        soup = with_exact_weights(stored, merge) if entries and exact else stored
        merged = MergedWeight(
            _average(soup),
            "averaged" if len(entries) > 1 else "kept",
            in_words([entry.id for entry in entries], taken),
            update_norm=soup.update_norm if soup is not stored else None,
        )
        merge.record(
            stored.group,
            self.spec,
            merged,
            report=report,
            started=started,
            parameters={
                **{key: parameters[key] for key in ("threshold", "layers")},
                "rounding": inputs.storage.rounding,
            },
            figures={"taken": len(taken)},
        )
        return merged.weight

    def _decide(
        self,
        group: TensorGroup,
        merge: Merge,
        parameters: Mapping[str, Any],
        measure: Callable[[], Alignment],
    ) -> SoupDecision:
        scores: PerInputValues[float | None] = parameters["score"]
        settings = {key: parameters[key] for key in ("threshold", "layers")}
        settings |= {f"score of {model}": value for model, value in scores.items()}
        models = _finetuned(merge, group)

        def take() -> SoupDecision:
            order = considered_in_order(len(models), _known_scores(models, scores, group.metadata.name))
            alignment = measure()
            decision = soup_decision(models, alignment, parameters["threshold"], order)
            LOG.info("%s", decision.sentence())
            if alignment.skipped:
                LOG.warning("sfgs decided without some tensors: %s", dict(alignment.skipped))
            return decision

        decision: SoupDecision = merge.decide(settings, group.metadata.name, take)
        return decision


def _average(inputs: GroupInputs) -> Tensor:
    count = len(inputs.group.non_base)
    if count == 0:
        return inputs.checked(inputs.stored_base)
    if count == 1:
        # W0 + (W1 - W0) would round where the two differ by orders of magnitude.
        inputs.require_finite()
        return inputs.sole_finetuned
    whole = torch.ones(1, device="cpu")
    try:
        result = towards_average(inputs.stored_base, inputs.stored_tuned, whole, inputs.storage)
    except NonFiniteError:
        inputs.require_finite()
        raise inputs.overflow() from None
    return inputs.checked(result)


def refinement(base: Any, models: Sequence[Any], merge: Merge) -> Refine | None:
    """Return what puts base + adapter, unrounded, in the place of merged copies, where there are any."""
    if not any(getattr(model, "lora", None) for model in models):
        return None

    def refine(name: str, tensors: list[Tensor]) -> list[Tensor]:
        entries = [
            TensorEntry(id=model, tensor=tensor, is_base=index == 0)
            for index, (model, tensor) in enumerate(zip((base, *models), tensors, strict=True))
        ]
        group = TensorGroup(tuple(entries), TensorMetadata(name))
        inputs = with_exact_weights(GroupInputs.of(group), merge)
        return [inputs.stored_base, *inputs.stored_tuned]

    return refine


def _finetuned(merge: Merge, group: TensorGroup) -> tuple[Any, ...]:
    return merge.finetuned or tuple(entry.id for entry in group.non_base)


def _known_scores(
    models: Sequence[Any], scores: PerInputValues[float | None], tensor: str | None
) -> list[float] | None:
    known = [scores.get(model) for model in models]
    given = [score for score in known if score is not None]
    if not given:
        return None
    if len(given) == len(models):
        return given
    absent = [str(model) for model in models if model not in scores]
    if absent:
        # mergekit passes on the parameters of those inputs only that have the tensor.
        raise ParameterError(
            f"the soup is decided on at tensor {tensor}, which {', '.join(absent)} does not have, so its "
            "score is not known there; leave out all scores and list the models best first"
        )
    missing = [str(model) for model in models if scores[model] is None]
    raise ParameterError(
        f"parameter 'score' is missing for {', '.join(missing)}; give every fine-tuned model a score, or "
        "none and list them best first"
    )


def _align_groups(groups: Sequence[TensorGroup], layers: Layers) -> Alignment:
    inputs = [[entry.id for entry in group.non_base] for group in groups]
    if any(ids != inputs[0] for ids in inputs):
        raise ConfigurationError(
            "sfgs takes one decision for all tensor groups, so each must have the same inputs"
        )

    # Named by position: groups need no names of their own.
    names = [str(index) for index in range(len(groups))]

    def member(position: int) -> Callable[[str], Tensor]:
        def tensor(name: str) -> Tensor:
            group = groups[int(name)]
            beside: Tensor = group.non_base[position].tensor.to(group.base.tensor.device)
            return beside

        return tensor

    stored = [(names, member(position)) for position in range(len(inputs[0]))]
    return align((names, lambda name: groups[int(name)].base.tensor), stored, layers)
