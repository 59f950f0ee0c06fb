"""Run the units of a merge on the workers of a Ray cluster.

Each worker reads the inputs itself (a shared file system, or its own cache of the Hub at the revision that
the driver has), and writes into the output's files where it sees them; otherwise tensors come back through
Ray's object store, a few at a time. Ray retries what a lost worker had; a unit that is computed twice is
written twice, with the same bytes.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.alignment.stored import Alignment, align_loaders, joined, loader_for
from mergekit_monosoup.checkpoint.pinned import pinned, revisions_of
from mergekit_monosoup.cluster.connection import RayOptions
from mergekit_monosoup.cluster.pool import Driver, Pool, node
from mergekit_monosoup.merging.adapters import MERGED_ADAPTERS, open_adapters
from mergekit_monosoup.merging.layout import Layout
from mergekit_monosoup.merging.opened import model_types
from mergekit_monosoup.merging.prepared import Prepared
from mergekit_monosoup.merging.units import Unit, compute, cost
from mergekit_monosoup.merging.writer import Writer
from mergekit_monosoup.methods.sfgs import refinement
from mergekit_monosoup.report.schema import TensorRecord

_TOKEN = "monosoup_token"


@dataclass(frozen=True)
class Computed:
    """One unit: the hash of its bytes where the worker has written them, else the tensor itself."""

    name: str
    sha256: str | None
    tensor: Tensor | None
    record: TensorRecord | None


class Worker:
    """What an actor does: prepare a recipe as the driver has, and compute units by their names."""

    def __init__(
        self,
        config: dict[str, Any],
        options: dict[str, Any],
        revisions: Mapping[str, str],
        path: str,
        token: str,
        driver: Driver,
    ) -> None:
        """Open the inputs; see whether the folder of the output is the driver's.

        Args:
            config, options: recipe and options, as JSON.
            revisions: commits on the Hub that the driver reads, by the names of models and adapters.
            path: folder of the output.
            token: what a file in it says.
            driver: the process that these come from.
        """
        from mergekit_monosoup.registry import register

        register()
        driver.follow()
        # As in a local run: a unit is never shared out among cores, so its bytes are the same everywhere.
        torch.set_num_threads(1)
        self._options = MergeOptions.model_validate(options)
        self._records: dict[str, TensorRecord] = {}
        recipe = pinned(MergeConfiguration.model_validate(config), revisions)
        copies = Path(path).parent / MERGED_ADAPTERS
        if not copies.is_dir():
            # The driver's folder is not at hand here.
            copies = Path(tempfile.gettempdir()) / f"monosoup-{token}" / str(os.getpid())
        open_adapters(recipe, self._options, copies)
        host.open_models(recipe.referenced_models(), self._options)
        types = model_types(recipe.referenced_models(), self._options)
        # Held for the life of this process, which does nothing else.
        self._types = ExitStack()
        self._types.enter_context(host.plain_configurations(types))
        self._prepared = Prepared.of(recipe, self._options, [self._take])
        self._units = {unit.name: unit for unit in self._prepared.units.units}
        self._writer = _shared(Path(path), token, self._prepared.layout)
        # What another machine has in its cache of the disk is lost with it, and the driver cannot flush it.
        self._flush = not driver.shares_memory()
        self._computing = threading.Lock()

    def compute(self, name: str, decision: Any) -> Computed:
        """Compute a unit; write it where the output's files are at hand."""
        host.open_models((), self._options)
        torch.set_num_threads(1)
        unit = self._units[name]
        loaded = {task: task.execute() for task in host.inputs_of(unit.task)}
        if decision is not None:
            self._prepared.merge.settle(decision)
        with self._computing:
            device = self._options.device or "cpu"
            tensor = compute(unit, self._prepared.units, loaded, math_device=device).cpu()
        record = self._records.pop(name, None)
        if record is not None:
            record = record.model_copy(update={"node": node()})
        if self._writer is not None:
            return Computed(name, self._writer.write(name, tensor, flush=self._flush), None, record)
        return Computed(name, None, tensor, record)

    def align(self, layers: Any, exact: bool, names: Sequence[str]) -> Alignment:
        """Return the inner products of some tensors' updates."""
        host.open_models((), self._options)
        torch.set_num_threads(1)
        merge = self._prepared.merge
        loaders = [loader_for(model) for model in merge.finetuned]
        refine = refinement(merge.base, merge.finetuned, merge) if exact else None
        return align_loaders(loader_for(merge.base), loaders, layers, "cpu", refine, names)

    def _take(self, record: TensorRecord) -> None:
        self._records[record.tensor] = record


def _shared(path: Path, token: str, layout: Layout) -> Writer | None:
    """Return a writer into the driver's files, None where the folder is another or cannot be written to."""
    try:
        seen = (path / _TOKEN).read_text("utf-8")
    except OSError:
        return None
    if seen != token or not os.access(path, os.W_OK):
        return None
    return Writer.reopen(path, layout)


class Cluster:
    """The workers of a merge on a Ray cluster."""

    def __init__(
        self, prepared: Prepared, options: MergeOptions, path: Path, ray_options: RayOptions
    ) -> None:
        """Start as many workers as the cluster has room for; `connected` is around all of it."""
        self._prepared = prepared
        token = secrets.token_hex(16)
        self._token = path / _TOKEN
        folders = {model: Path(host.folder_of(model)) for model in prepared.models}
        revisions = revisions_of(prepared.models, folders, options.transformers_cache)
        arguments = (
            prepared.config.model_dump(mode="json"),
            options.model_dump(),
            revisions,
            str(path),
            token,
            Driver.here(),
        )
        on_gpu = bool(options.device and options.device != "cpu")
        # Before any worker looks for it.
        self._token.write_text(token, "utf-8")
        try:
            self._pool = Pool(Worker, arguments, ray_options, most=len(prepared.units.units), on_gpu=on_gpu)
        except BaseException:
            self._token.unlink()
            raise

    def run(
        self,
        units: Sequence[Unit],
        written: Callable[[Unit, str, TensorRecord | None], None],
        write: Callable[[Unit, Tensor, TensorRecord | None], None],
    ) -> None:
        """Compute units, the longest first, a few on each worker at a time.

        Args:
            units: those to compute.
            written: takes a unit that its worker has written, with its hash and its record.
            write: takes a unit whose tensor came back.

        Raises:
            MonoSoupError: of the first unit that fails, as it would be raised here.
        """
        by_name = {unit.name: unit for unit in units}
        decision = self._prepared.merge.decided()
        jobs = [(unit.name, decision) for unit in sorted(units, key=cost, reverse=True)]
        done: Computed
        for done in self._pool.each("compute", jobs):
            unit = by_name[done.name]
            if done.tensor is not None:
                write(unit, done.tensor, done.record)
            else:
                written(unit, str(done.sha256), done.record)
            del done

    def align(self, layers: Any, exact: bool) -> Alignment:
        """Return the inner products of all tensors' updates: map over the workers, reduce here."""
        names = sorted(loader_for(self._prepared.merge.base).index.tensor_paths)
        size = max(1, -(-len(names) // (4 * self._pool.size)))
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        return joined(list(self._pool.each("align", [(layers, exact, part) for part in parts])))

    def close(self) -> None:
        """Let the workers go."""
        self._token.unlink(missing_ok=True)
        self._pool.close()
