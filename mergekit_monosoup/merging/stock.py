"""The merges of mergekit's own commands, which hand over one tensor at a time: the only ambient state.

mergekit says neither which merge a tensor belongs to nor when a merge begins and ends. But it hands on
the very objects that the recipe's models were parsed into: first when it validates the recipe (or each of
its slices), then with every tensor that it plans, at last with the tensor's values. By them a tensor
finds its merge, whatever else is planned or run in the process; and when they go, it goes.
"""

from __future__ import annotations

import atexit
import logging
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.methods.inputs import is_whole_recipe
from mergekit_monosoup.methods.merge import Merge, checkpoint_folder

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.merge_methods.base import MergeMethodSpec, TensorGroup

LOG = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass
class _Plan:
    """A merge that mergekit plans: the parts of its recipe, the tensors it will have."""

    merge: Merge
    parts: list[str | None] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    begun: bool = False


class _Planning(threading.local):
    """What this thread plans: mergekit plans one merge after another."""

    plan: _Plan | None = None
    # Set once mergekit has gone on from the recipe to its tensors.
    sealed: bool = False
    suspended: bool = False


class Stock:
    """The merges that mergekit's own commands have planned in this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._plans: dict[int, tuple[weakref.ref[Any], _Plan]] = {}
        self._planning = _Planning()
        # A merge method is never told that the merge is over; the process's end is that.
        atexit.register(self.close)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Take no note of what this thread plans: a run keeps its own merge."""
        before, self._planning.suspended = self._planning.suspended, True
        try:
            yield
        finally:
            self._planning.suspended = before

    def planned(self, spec: MergeMethodSpec, inputs: Sequence[Any], base: Any, name: str | None) -> None:
        """Take note of a recipe, one of its slices, or a tensor that mergekit plans.

        Raises:
            ConfigurationError: the slices list different checkpoints, and the method decides once for all.
            QuantizedWeightError: a checkpoint stores its weights as integers.
        """
        from mergekit.common import ModelReference

        if self._planning.suspended or not all(isinstance(model, ModelReference) for model in inputs):
            return
        if is_whole_recipe(name):
            self._recipe(spec, inputs, base, name)
        elif name is not None:
            self._planning.sealed = True
            plan = self._plan_of(inputs)
            if plan is not None:
                plan.names.add(name)

    def _recipe(
        self, spec: MergeMethodSpec, inputs: Sequence[ModelReference], base: Any, name: str | None
    ) -> None:
        from mergekit_monosoup.checkpoint.quantized import refuse_quantized_checkpoint

        now = self._planning
        plan = now.plan
        if plan is None or now.sealed or name in plan.parts:
            self.close()
            plan = _Plan(Merge())
        # Not left behind for the next merge if this one is refused.
        now.plan = None
        # Copies: the plan must not keep alive the objects that it lives by.
        finetuned = tuple(model.model_copy() for model in inputs if model != base)
        if plan.parts and (finetuned, base) != (plan.merge.finetuned, plan.merge.base):
            if spec.name == "sfgs":
                raise ConfigurationError(
                    f"{name} lists other checkpoints than {plan.parts[0]}, or lists them in another order; "
                    "this method takes one decision for the whole model, so all slices must list the same"
                )
            finetuned = tuple(dict.fromkeys((*plan.merge.finetuned, *finetuned)))
        for model in inputs:
            refuse_quantized_checkpoint(model, is_base=model == base)
        plan.parts.append(name)
        plan.merge.finetuned, plan.merge.base = finetuned, base.model_copy()
        with self._lock:
            for model in (*inputs, base):
                self._plans[id(model)] = (weakref.ref(model, self._forget), plan)
        # A nameless part is the whole recipe: nothing will join it.
        now.plan, now.sealed = plan, name is None

    def _forget(self, reference: weakref.ref[Any]) -> None:
        with self._lock:
            gone = {id(plan): plan for held, plan in self._plans.values() if held is reference}
            self._plans = {key: held for key, held in self._plans.items() if held[0] is not reference}
            kept = {id(plan) for _, plan in self._plans.values()}
        for key, plan in gone.items():
            if key not in kept:
                plan.merge.close()

    def _plan_of(self, models: Sequence[Any]) -> _Plan | None:
        with self._lock:
            for model in models:
                reference, plan = self._plans.get(id(model), (None, None))
                if reference is not None and reference() is model:
                    return plan
        return None

    def merge_of(self, group: TensorGroup) -> Merge:
        """Return the merge that a group belongs to; of its own where none was planned.

        With the first tensor of a merge, its plan is complete: names what the merged model will lack.
        """
        plan = self._plan_of([entry.id for entry in group.entries])
        if plan is None:
            return Merge(group.base.id if group.base is not None else None)
        with self._lock:
            first, plan.begun = not plan.begun, True
        if first:
            _name_lost(plan)
            _name_files(plan)
        return plan.merge

    def close(self) -> None:
        """Complete the reports of earlier merges: called when the next one begins, and at exit."""
        with self._lock:
            plans = {id(plan): plan for _, plan in self._plans.values()}
        for plan in plans.values():
            plan.merge.close()


def _name_lost(plan: _Plan) -> None:
    """Name the tensors of the inputs that mergekit's plan leaves out, of the first model that has any."""
    for model in (*plan.merge.finetuned, plan.merge.base):
        lost = _lost(model, plan.names)
        if lost:
            from mergekit_monosoup.checkpoint.coverage import describe

            LOG.warning(
                "%d tensors of %s will not be in the merged model, because mergekit's definition of "
                "its architecture does not have them: %s. `mergekit-monosoup merge` takes them by "
                "their names",
                len(lost),
                model,
                describe(lost),
            )
            return


def _name_files(plan: _Plan) -> None:
    """Say which files of the fine-tuned checkpoint mergekit's commands will take from the base instead."""
    if plan.merge.base is None or not plan.merge.finetuned:
        return
    base, finetuned = checkpoint_folder(plan.merge.base), checkpoint_folder(plan.merge.finetuned[0])
    adapter = getattr(plan.merge.finetuned[0], "lora", None)
    if adapter is not None:
        # mergekit has merged it into a folder without any of its other files.
        finetuned = Path(adapter.path)
    if base is None or finetuned is None or not finetuned.is_dir():
        return
    from mergekit_monosoup.checkpoint.companions import difference

    found = difference(base, finetuned)
    if found is not None:
        LOG.warning(
            "%s has %s, and mergekit copies the base's; bring them over afterwards by `mergekit-monosoup "
            "complete OUT --from %s`, or merge by `mergekit-monosoup merge`",
            plan.merge.finetuned[0],
            found,
            plan.merge.finetuned[0],
        )


def _lost(model: ModelReference, planned: set[str]) -> list[str]:
    from mergekit.architecture import arch_info_for_config
    from mergekit.io.tasks import LoaderCache

    from mergekit_monosoup.checkpoint.coverage import check_coverage, weights_named

    loader = LoaderCache.loaders.get(model)
    if loader is None:
        # mergekit-pytorch plans by the names in the files.
        return []
    try:
        config = model.config(trust_remote_code=LoaderCache().trust_remote_code)
    except (OSError, ValueError):
        # A bare state dict, as other front ends of mergekit may merge: nothing says what is missing.
        return []
    arch = arch_info_for_config(config)
    weights = weights_named(planned, arch.all_weights(config) if arch else ())
    lost = check_coverage(weights, loader.index.tensor_paths, config.model_type).lost
    # A recipe may leave layers out or move them on purpose.
    planned_in_some_layer = {_NUMBER.sub("#", name) for name in planned}
    return [name for name in lost if _NUMBER.sub("#", name) not in planned_in_some_layer]
