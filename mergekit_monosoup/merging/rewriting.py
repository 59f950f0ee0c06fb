"""Make of the tensors that mergekit plans those that the fine-tuned checkpoint has."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from pydantic import ConfigDict
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.float8 import DEQUANTISED, FLOAT8, dequantise
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.scales import scale_name
from mergekit_monosoup.checkpoint.storage import wide_tensors
from mergekit_monosoup.checkpoint.vocabulary import Vocabularies
from mergekit_monosoup.merging.vocabulary import on_shared_rows
from mergekit_monosoup.report.schema import Action

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewritten:
    """How a tensor of the output is made.

    Args:
        task: makes it.
        dtype: that it is stored in, where that is not the result's.
        passed_on: what is done with it and why, where no merge method is asked.
        rows_kept: number of rows that take no part in the merge.
    """

    task: Task[Any]
    dtype: torch.dtype | None = None
    passed_on: tuple[Action, str] | None = None
    rows_kept: int = 0


class Dequantised(Task[Any]):
    """A float8 tensor times its scale."""

    model_config = ConfigDict(frozen=True)

    load: LoadTensor
    scale: LoadTensor

    def arguments(self) -> dict[str, Task[Any]]:
        """Return what is needed before."""
        return {"weight": self.load, "scale": self.scale}

    def execute(self, weight: Tensor, scale: Tensor, **_: Any) -> Tensor:
        """Return the values in bfloat16, or in what the recipe has asked for."""
        value = dequantise(weight, scale, self.load.tensor)
        return value.to(DEQUANTISED if weight.dtype in FLOAT8 else weight.dtype)


class Rewriter:
    """Rewrite the tasks of one merge; `checkpoint/layout.py` has the same rules for its plan."""

    def __init__(
        self,
        config: MergeConfiguration,
        checkpoints: Mapping[ModelReference, Checkpoint],
        shapes: host.Shapes,
        *,
        ours: bool,
    ) -> None:
        """Take what is known of the merge; `ours` says whether its method is one of ours."""
        self._base, self._shapes, self._ours = config.base_model, shapes, ours
        models = list(checkpoints.values())
        self._checkpoints = checkpoints
        self._names = {model: checkpoint.name for model, checkpoint in checkpoints.items()}
        self._vocabularies = Vocabularies(models)
        self._said = False
        self._wide = wide_tensors(models[0].tensors.values()) if ours else frozenset()

    def rewritten(self, entry: host.PlannedTask) -> Rewritten | None:
        """Return how a planned tensor is made, None where the output is without it.

        Raises:
            InputError: the tokenizers have too few tokens in common.
        """
        task, made = entry.task, Rewritten(entry.task, entry.dtype)
        if not isinstance(task, ExecuteMergeMethodTask):
            return made
        base = task.base_model or self._base
        if self._ours and self._is_tied(task, base):
            return None
        loads = host.loads_of(task)
        if not loads:
            return made
        if self._ours and host.stored_name(_first(loads, base)) in self._wide:
            task = host.with_dtype(task, "float32")
            made, loads = Rewritten(task, torch.float32), host.loads_of(task)
        first = _first(loads, base)
        present = {load: like for load in loads if (like := self._shapes.of(load)) is not None}
        if self._ours and present and all(load.model != base for load in present):
            return replace(made, task=self._alone(first), passed_on=_NEW) if first in present else None
        if self._ours and task.output_weight.optional and all(load.model == base for load in present):
            return replace(made, task=self._alone(next(iter(present))), passed_on=_OLD) if present else None
        return self._by_row(made, task, present, first)

    def _alone(self, load: LoadTensor) -> Task[Any]:
        """Return a task for a tensor that only one checkpoint has."""
        name = host.stored_name(load)
        held = self._checkpoints[load.model].tensors
        scale = scale_name(name, held) if name is not None else None
        if scale is None or name is None or not held[name].dtype.startswith("float8"):
            return load
        return Dequantised(load=load, scale=load.model_copy(update={"tensor": scale, "dtype": None}))

    @staticmethod
    def _is_tied(task: ExecuteMergeMethodTask, base: ModelReference | None) -> bool:
        """Say whether the first fine-tuned checkpoint has another tensor in the place of this one."""
        by_model = {load.model: load for load in host.inputs_of(task)}
        first = _first([by_model[model] for model in task.model_order], base)
        return host.stored_name(first) in (first.tied_names or ())

    def _by_row(
        self,
        made: Rewritten,
        task: ExecuteMergeMethodTask,
        present: Mapping[LoadTensor, Tensor],
        first: LoadTensor,
    ) -> Rewritten:
        """Merge the rows of an embedding that all checkpoints have."""
        axis = host.vocabulary_axis(task)
        if axis < 0 or any(like.ndim <= axis for like in present.values()):
            return made
        ordered = sorted(present, key=lambda load: load != first)
        sizes = {self._names[load.model]: present[load].shape[axis] for load in ordered}
        shared = self._vocabularies.shared(sizes)
        if shared is None:
            return made
        # Of local checkpoints, the plan has said so.
        unread = [name for name in self._vocabularies.unread if not Path(name).is_dir()]
        if unread and not self._said:
            self._said = True
            LOG.warning("%s has no tokenizer that could be read; rows are matched by index", unread[0])
        by_name = {self._names[load.model]: load for load in ordered}
        loads = [by_name[name] for name in self._vocabularies.ordered(sizes)]
        return replace(made, task=on_shared_rows(task, loads, shared), rows_kept=shared.kept)


def _first(loads: Sequence[LoadTensor], base: ModelReference | None) -> LoadTensor:
    """Return the task that loads the tensor whose layout the output has."""
    return next((load for load in loads if load.model != base), loads[0])


_NEW: tuple[Action, str] = ("kept", "the base does not have it")
_OLD: tuple[Action, str] = ("copied", "only the base has it")
