"""The units of a merge: the tensors of its output, what they look like, and how each is made."""

from __future__ import annotations

import logging
import math
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
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
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.errors import InputError, OutputError
from mergekit_monosoup.merging.adapters import with_adapters
from mergekit_monosoup.merging.opened import open_with_common_names
from mergekit_monosoup.merging.rewriting import Rewriter
from mergekit_monosoup.methods.contract import MERGE, UpdateMethod
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.report.schema import Action
from mergekit_monosoup.spectral.matrix import choose_view
from mergekit_monosoup.spectral.update import smaller_pieces

LOG = logging.getLogger(__name__)

# torch's generator is the process's.
_DRAWS = threading.Lock()


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
    """All units of a merge, and what they share.

    Args:
        units: in mergekit's order.
        tokenizer: of the output, where the recipe asks for one.
        seed: of methods that draw numbers; None where nothing is drawn, or without a seed.
    """

    units: tuple[Unit, ...]
    tokenizer: tuple[BuildTokenizer, TokenizerInfo] | None
    seed: int | None = None


def plan_units(
    config: MergeConfiguration,
    arch: ModelArchitecture,
    options: MergeOptions,
    out_config: Any,
    merge: Merge,
    checkpoints: Mapping[ModelReference, Checkpoint] | None = None,
) -> PlannedUnits:
    """Plan the tensors of a recipe by mergekit's planner; those of our methods carry `merge`.

    Args:
        config: the recipe; brought into mergekit's normal form.
        arch: the tensors of its models.
        options, out_config: as mergekit's planner takes them.
        merge: what the tensors share.
        checkpoints: the models as `open_with_common_names` returns them.
    """
    from mergekit import merge_methods

    checkpoints = checkpoints or open_with_common_names(config)
    planned, builder = host.plan_tasks(config, arch, options, out_config)
    tokenizer = (builder, host.run_task(builder)) if builder is not None else None
    headers = {model: _headers(checkpoint) for model, checkpoint in checkpoints.items()}
    shapes = host.Shapes(headers, tokenizer[1] if tokenizer else None)
    ours = isinstance(merge_methods.get(config.merge_method), UpdateMethod)
    rewriter = Rewriter(config, checkpoints, shapes, ours=ours)
    # By name: some definitions list a tensor under two modules, and the last one counts.
    units: dict[str, Unit] = {}
    for entry in planned:
        made = rewriter.rewritten(entry)
        like = shapes.of(made.task) if made is not None else None
        if made is None or like is None:
            continue
        task, passed_on = with_adapters(made.task, merge), made.passed_on
        dtype = made.dtype or like.dtype
        if isinstance(entry.task, ExecuteMergeMethodTask):
            if not like.is_floating_point() and passed_on is None:
                passed_on = ("copied", "not floating-point")
            if ours:
                if made.rows_kept:
                    merge.rows_kept[entry.name] = (tuple(like.shape), made.rows_kept)
                task = host.with_parameters(task, **{MERGE: merge})
                dtype = DEQUANTISED if dtype in FLOAT8 else dtype
                merge.stored_dtypes[entry.name] = dtype
        units[entry.name] = Unit(entry.name, task, tuple(like.shape), dtype, passed_on)
    # Ours draw by the name of a tensor and have no use for torch's own generator.
    return PlannedUnits(tuple(units.values()), tokenizer, None if ours else options.random_seed)


def _headers(checkpoint: Checkpoint) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n: (tensor.shape, getattr(torch, tensor.dtype)) for n, tensor in checkpoint.tensors.items()}


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
        with _drawing(planned.seed, unit.name):
            result = _on_device(unit, planned, loaded, math_device, storage_device)
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


@contextmanager
def _drawing(seed: int | None, name: str) -> Iterator[None]:
    """Let what is drawn depend on the seed and the tensor alone: not on others before it or beside it."""
    if seed is None:
        yield
        return
    with _DRAWS:
        torch.manual_seed(seed ^ zlib.crc32(name.encode()))
        yield


def _on_device(
    unit: Unit,
    planned: PlannedUnits,
    loaded: Mapping[Task[Any], Any] | None,
    math_device: str | torch.device,
    storage_device: str | torch.device,
) -> torch.Tensor:
    # Blocks may be what the device has no room for, or the inputs themselves.
    for pieces in (nullcontext(), smaller_pieces()):
        with suppress(torch.OutOfMemoryError), pieces:
            result: torch.Tensor = host.run_task(
                unit.task, planned.tokenizer, loaded, math_device=math_device, storage_device=storage_device
            )
            return result
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    _say_once(f"{math_device} is out of memory: tensors that it has no room for are computed on the CPU")
    result = host.run_task(unit.task, planned.tokenizer, loaded)
    return result


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
    """Return how long a unit takes, in operations."""
    return operations(unit.name, unit.shape)


def operations(name: str, shape: tuple[int, ...]) -> float:
    """Return what an update of this shape takes: a decomposition for a matrix, else a few passes."""
    view = choose_view(shape, name)
    if not view.decomposes:
        return 10.0 * math.prod(shape)
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
