"""The units of a merge: the tensors of its output, what they look like, and how each is made."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.float8 import DEQUANTISED, FLOAT8
from mergekit_monosoup.checkpoint.headers import header_of
from mergekit_monosoup.errors import InputError, OutputError
from mergekit_monosoup.lora.adapted import AdaptedLoader
from mergekit_monosoup.merging.adapters import base_models, with_adapters
from mergekit_monosoup.methods.contract import MERGE, UpdateMethod
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.report.schema import Action
from mergekit_monosoup.spectral.matrix import choose_view

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """One tensor of the output.

    Args:
        name: in the output.
        task: makes it, of the tensors of the inputs.
        shape, dtype: as it will be stored.
        passed_on: what is done with it and why, where no merge method is asked (and records it).
    """

    name: str
    task: Task[Any]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    passed_on: tuple[Action, str] | None = None

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedUnits:
    """All units of a merge, and the tokenizer of its output where the recipe asks for one."""

    units: tuple[Unit, ...]
    tokenizer: tuple[BuildTokenizer, TokenizerInfo] | None


def plan_units(
    config: MergeConfiguration,
    arch: ModelArchitecture,
    options: MergeOptions,
    out_config: Any,
    merge: Merge,
) -> PlannedUnits:
    """Plan the tensors of a recipe by mergekit's planner; those of our methods carry `merge`.

    Args:
        config: the recipe; brought into mergekit's normal form.
        arch: the tensors of its models.
        options, out_config: as mergekit's planner takes them.
        merge: what the tensors share.
    """
    from mergekit import merge_methods

    planned, builder = host.plan_tasks(config, arch, options, out_config)
    tokenizer = (builder, host.run_task(builder)) if builder is not None else None
    shapes = host.Shapes(
        {model: stored_shapes(model) for model in (*config.referenced_models(), *base_models(config))},
        tokenizer[1] if tokenizer else None,
    )
    ours = isinstance(merge_methods.get(config.merge_method), UpdateMethod)
    # By name: some definitions list a tensor under two modules, and the last one counts.
    units: dict[str, Unit] = {}
    for entry in planned:
        task = with_adapters(entry.task, merge)
        like = shapes.of(task)
        if like is None:
            continue
        dtype = entry.dtype or like.dtype
        passed_on: tuple[Action, str] | None = None
        if isinstance(task, ExecuteMergeMethodTask):
            if not like.is_floating_point():
                passed_on = ("copied", "not floating-point")
            if ours:
                task = host.with_parameters(task, **{MERGE: merge})
                dtype = DEQUANTISED if dtype in FLOAT8 else dtype
                merge.stored_dtypes[entry.name] = dtype
        units[entry.name] = Unit(entry.name, task, tuple(like.shape), dtype, passed_on)
    return PlannedUnits(tuple(units.values()), tokenizer)


def stored_shapes(model: ModelReference) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor of a checkpoint that mergekit has opened."""
    loader = host.loader_of(model)
    if loader is None:
        return {}
    if isinstance(loader, AdaptedLoader):
        return loader.shapes(stored_shapes(loader.base_model))
    index = loader.index
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for shard in index.shards:
        held = header_of(Path(index.base_path) / shard.filename)
        for name in shard.contained_keys:
            if name in held:
                found[name] = (held[name].shape, getattr(torch, held[name].dtype))
    return found


def compute(
    unit: Unit,
    planned: PlannedUnits,
    loaded: Mapping[Task[Any], Any] | None = None,
    *,
    math_device: str | torch.device = "cpu",
    storage_device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Return the tensor of a unit in the dtype that it is stored in.

    Args:
        unit: what to compute.
        planned: the units it belongs to.
        loaded: inputs that have been read already, by their tasks.
        math_device, storage_device: as mergekit's executor has them.
    """
    try:
        try:
            result: torch.Tensor = host.run_task(
                unit.task, planned.tokenizer, loaded, math_device=math_device, storage_device=storage_device
            )
        except torch.OutOfMemoryError:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            _say_once(
                f"{math_device} is out of memory: tensors that it has no room for are computed on the CPU"
            )
            result = host.run_task(unit.task, planned.tokenizer, loaded)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise InputError(
            f"tensor {unit.name}: its decomposition failed ({error}); set `spectrum: svd` for it, or "
            "`edit: false`"
        ) from error
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(f"tensor {unit.name}") from error
        raise
    return result.to(unit.dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether the operating system has no more memory to give, in whichever words of a library."""
    said = ("allocate memory", "start new thread")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def out_of_memory(what: str) -> OutputError:
    """Return the error for it."""
    return OutputError(
        f"{what}: there is not enough memory; close other programs, or let fewer tensors be computed at a "
        "time (OMP_NUM_THREADS=1)"
    )


@cache
def _say_once(message: str) -> None:
    LOG.warning("%s", message)


def cost(unit: Unit) -> float:
    """Return how long a unit takes, in operations: of a decomposition for a matrix, else of a few passes."""
    view = choose_view(unit.shape, unit.name)
    if not view.decomposes:
        return 10.0 * unit.size
    count, rows, columns = view.shape
    short = min(rows, columns)
    return count * (4.0 * short * rows * columns + 9.0 * short**3)


def by_input(units: Sequence[Unit]) -> list[Unit]:
    """Return the units file by file of their inputs, so that each is opened once.

    Of a file the largest come first: what takes longest must not begin last.
    """

    def place(unit: Unit) -> tuple[str, int]:
        files = []
        for task in host.inputs_of(unit.task):
            loader = host.loader_of(task.model)
            name = host.stored_name(task)
            if loader is not None and name is not None:
                files.append(loader.index.tensor_paths[name])
        return max(files, default=""), -unit.size

    return sorted(units, key=place)
