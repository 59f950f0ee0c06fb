"""Merge the rows of embeddings that all checkpoints have, and keep the others as the fine-tune has them."""

from __future__ import annotations

from typing import Any

import torch
from mergekit.common import ImmutableMap
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from pydantic import ConfigDict
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.vocabulary import Rows, SharedRows


class Index:
    """Rows of a tensor. Told apart by identity: tasks are hashed often, and there may be 250 000 rows."""

    def __init__(self, rows: Rows) -> None:
        self._rows = torch.from_numpy(rows)
        self._leading = bool((self._rows == torch.arange(len(rows), device=self._rows.device)).all())

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """Return these rows of a tensor; a view where they are its first ones."""
        if self._leading:
            return tensor.narrow(axis, 0, len(self._rows))
        return tensor.index_select(axis, self._rows.to(tensor.device))

    def put(self, tensor: Tensor, axis: int, values: Tensor) -> None:
        """Write values into these rows of a tensor."""
        tensor.index_copy_(axis, self._rows.to(tensor.device), values)


class SelectRows(Task[Any]):
    """Some rows of a loaded tensor."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    load: LoadTensor
    rows: Index
    axis: int

    def arguments(self) -> dict[str, Task[Any]]:
        """Return what is needed before."""
        return {"tensor": self.load}

    def execute(self, tensor: Tensor | None, **_: Any) -> Tensor | None:
        """Return the rows; None where the checkpoint has no such tensor."""
        return None if tensor is None else self.rows.of(tensor, self.axis)


class RestoreRows(Task[Any]):
    """A tensor with some of its rows replaced by merged ones."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    merged: ExecuteMergeMethodTask
    own: LoadTensor
    rows: Index
    axis: int

    def arguments(self) -> dict[str, Task[Any]]:
        """Return what is needed before."""
        return {"merged": self.merged, "own": self.own}

    def execute(self, merged: Tensor, own: Tensor, **_: Any) -> Tensor:
        """Return the whole tensor in the dtype of the merge."""
        result = own.to(merged.device, merged.dtype, copy=True)
        self.rows.put(result, self.axis, merged)
        return result


def on_shared_rows(task: ExecuteMergeMethodTask, loads: list[LoadTensor], shared: SharedRows) -> RestoreRows:
    """Return a task that merges the rows in common into the first checkpoint's tensor.

    Args:
        task: the merge of whole tensors.
        loads: of the tensors, in the order of `shared`.
        shared: the rows in common.
    """
    axis = host.vocabulary_axis(task)
    selected = {
        load.model: SelectRows(load=load, rows=Index(rows), axis=axis)
        for load, rows in zip(loads, shared.rows, strict=True)
    }
    merged = task.model_copy(
        update={"gather_tensors": TensorDictWrapper(tensors=ImmutableMap(data=selected))}
    )
    return RestoreRows(merged=merged, own=loads[0], rows=Index(shared.into), axis=axis)
