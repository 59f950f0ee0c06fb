"""The merge method `sfgs`: Similarity-Filtered Greedy Soup."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
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
from mergekit_monosoup.methods.contract import UpdateMethod, specification
from mergekit_monosoup.methods.inputs import GroupInputs, is_whole_recipe
from mergekit_monosoup.methods.merge_plan import (
    PLAN,
    MergePlan,
    announce,
    in_memory_plan,
    plan_parameter,
)
from mergekit_monosoup.methods.parameters import choice, number, optional_number
from mergekit_monosoup.methods.reporting import REPORT, note

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
        REPORT,
        plan_parameter(),
    ),
)


class _Plan(MergePlan[SoupDecision]):
    """A plan that knows who wants to hear of its decision, in whichever thread that is taken."""

    def __init__(self, *, in_memory: bool = False) -> None:
        super().__init__(in_memory=in_memory)
        self.listener = _LISTENER.get()


_LISTENER: ContextVar[list[SoupDecision] | None] = ContextVar("sfgs_decisions", default=None)


@contextmanager
def recorded_decisions() -> Iterator[list[SoupDecision]]:
    """Collect the decisions of the merges that are planned inside the block."""
    decisions: list[SoupDecision] = []
    token = _LISTENER.set(decisions)
    try:
        yield decisions
    finally:
        _LISTENER.reset(token)


class SimilarityFilteredGreedySoup(UpdateMethod):
    """Average the checkpoints whose updates point the soup's way: W = W0 + mean of the taken updates.

    One decision for the whole model (arXiv 2602.09689): a candidate is taken if the average over
    the tensors of cos(dW_candidate, dW_soup) exceeds the threshold. It is taken on the tensors as
    they are stored, before `dtype:` and `tokenizer:` change them; a tensor counts if all checkpoints
    store it in the same shape. The average works in float32 (float64 for float64) and rounds once.
    """

    spec = _SPEC

    def validate_inputs(self, input_ids: Any, base_id: Any = None, *, group_name: str | None = None) -> None:
        """Refuse a recipe or a tensor group without base, without fine-tuned model, or quantised."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if is_whole_recipe(group_name):
            announce(group_name, input_ids, base_id, _Plan)

    def __call__(self, groups: Sequence[TensorGroup], /, **options: Any) -> tuple[Tensor, ...]:
        """Merge groups that are all in hand, taking the decision over all of them."""
        with in_memory_plan(_Plan(in_memory=True)):
            result: tuple[Tensor, ...] = super().__call__(groups, **options)
        return result

    def _execute(
        self, groups: Sequence[TensorGroup], parameters: list[dict[str, Any]], *args: Any, **options: Any
    ) -> tuple[Tensor, ...]:
        for group, given in zip(groups, parameters, strict=True):
            if given[PLAN].in_memory:
                self._decide(group, given, partial(_align_groups, groups, given["layers"]))
        result: tuple[Tensor, ...] = super()._execute(groups, parameters, *args, **options)
        return result

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Return W0 + the mean of the taken updates, in the shape and dtype of the inputs.

        Raises:
            ParameterError: `threshold`, `layers` or `score` is not the same for all tensors, or some
                checkpoints have a score and others have none.
            MissingTensorError: no tensor is comparable.
            InputError: shapes differ, or a tensor holds NaN, infinity or integers.
        """
        plan: _Plan = parameters[PLAN]
        device = group.entries[0].tensor.device

        def read_checkpoints() -> Alignment:
            models = _finetuned(plan, group)
            loaders = [loader_for(model) for model in models]
            refine = _refine(group.base.id, models) if parameters["exact_lora"] else None
            return align_loaders(loader_for(group.base.id), loaders, parameters["layers"], device, refine)

        taken = self._decide(group, parameters, read_checkpoints).taken
        # The decision is the whole merge's and not this tensor's.
        started = time.perf_counter()
        entries = [entry for entry in group.non_base if entry.id in taken]
        stored = GroupInputs.of(TensorGroup((group.base, *entries), group.metadata))
        inputs = with_exact_weights(stored) if entries and parameters["exact_lora"] else stored
        result = _average(inputs)
        note(
            stored.group,
            self.spec,
            "averaged" if len(entries) > 1 else "kept",
            in_words([entry.id for entry in entries], taken),
            report=parameters["report"],
            update_norm=inputs.update_norm if inputs is not stored else None,
            started=started,
            parameters={key: parameters[key] for key in ("threshold", "layers")},
            figures={"taken": len(taken)},
        )
        return result

    def _decide(
        self, group: TensorGroup, parameters: dict[str, Any], measure: Callable[[], Alignment]
    ) -> SoupDecision:
        plan: _Plan = parameters[PLAN]
        scores: PerInputValues[float | None] = parameters["score"]
        settings = {key: parameters[key] for key in ("threshold", "layers")}
        settings |= {f"score of {model}": value for model, value in scores.items()}
        models = _finetuned(plan, group)

        def take() -> SoupDecision:
            order = considered_in_order(len(models), _known_scores(models, scores, group.metadata.name))
            alignment = measure()
            decision = soup_decision(models, alignment, parameters["threshold"], order)
            LOG.info("%s", decision.sentence())
            if alignment.skipped:
                LOG.warning("sfgs decided without some tensors: %s", dict(alignment.skipped))
            if plan.listener is not None:
                plan.listener.append(decision)
            return decision

        return plan.decide(settings, group.metadata.name, take)


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
        result = towards_average(inputs.stored_base, inputs.stored_tuned, whole)
    except NonFiniteError:
        inputs.require_finite()
        raise inputs.overflow() from None
    return inputs.checked(result)


def _refine(base: Any, models: Sequence[Any]) -> Refine | None:
    """Return what puts base + adapter, unrounded, in the place of their merged copies."""
    if not any(getattr(model, "lora", None) for model in models):
        return None

    def refine(name: str, tensors: list[Tensor]) -> list[Tensor]:
        entries = [
            TensorEntry(id=model, tensor=tensor, is_base=index == 0)
            for index, (model, tensor) in enumerate(zip((base, *models), tensors, strict=True))
        ]
        inputs = with_exact_weights(GroupInputs.of(TensorGroup(tuple(entries), TensorMetadata(name))))
        return [inputs.stored_base, *inputs.stored_tuned]

    return refine


def _finetuned(plan: _Plan, group: TensorGroup) -> tuple[Any, ...]:
    return plan.finetuned or tuple(entry.id for entry in group.non_base)


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
        return lambda name: groups[int(name)].non_base[position].tensor

    stored = [(names, member(position)) for position in range(len(inputs[0]))]
    return align((names, lambda name: groups[int(name)].base.tensor), stored, layers)


SFGS = SimilarityFilteredGreedySoup()
