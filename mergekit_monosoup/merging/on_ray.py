"""Run the units of a merge on the workers of a Ray cluster.

Each worker reads the inputs itself (a shared file system, or its own cache of the Hub at the revision that
the driver has), and writes into the output's files where it sees them; otherwise tensors come back through
Ray's object store, a few at a time. Ray retries what a lost worker had; a unit that is computed twice is
written twice, with the same bytes.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.alignment.stored import Alignment, align_loaders, joined, loader_for
from mergekit_monosoup.errors import ConfigurationError, MonoSoupError, OutputError
from mergekit_monosoup.merging.adapters import MERGED_ADAPTERS, open_adapters
from mergekit_monosoup.merging.layout import Layout
from mergekit_monosoup.merging.opened import model_types
from mergekit_monosoup.merging.prepared import Prepared
from mergekit_monosoup.merging.units import Unit, compute, cost
from mergekit_monosoup.merging.writer import Writer
from mergekit_monosoup.methods.sfgs import refinement
from mergekit_monosoup.report.schema import TensorRecord

LOG = logging.getLogger(__name__)

# Of each worker: one unit that is computed, and one whose inputs are read meanwhile.
_IN_FLIGHT = 2
# Seconds to wait for a cluster to answer.
_PATIENCE = 10
_TOKEN = "monosoup_token"


@dataclass(frozen=True)
class RayOptions:
    """Where to run, and what each worker takes of the cluster.

    Args:
        address: of a running cluster, `auto` for the one this machine belongs to, `local` for one of our own.
        cpus, gpus: of each worker; absent: one processor, and a GPU where the merge runs on GPUs.
    """

    address: str
    cpus: float | None = None
    gpus: float | None = None


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
    ) -> None:
        """Open the inputs; see whether the folder of the output is the driver's."""
        from mergekit_monosoup.registry import register

        register()
        # As in a local run: a unit is never shared out among cores, so its bytes are the same everywhere.
        torch.set_num_threads(1)
        self._options = MergeOptions.model_validate(options)
        self._records: dict[str, TensorRecord] = {}
        recipe = MergeConfiguration.model_validate(config)
        copies = Path(path).parent / MERGED_ADAPTERS
        if not copies.is_dir():
            # The driver's folder is not at hand here.
            copies = Path(tempfile.gettempdir()) / f"monosoup-{token}" / str(os.getpid())
        open_adapters(recipe, self._options, copies, revisions)
        host.open_models(recipe.referenced_models(), self._options, revisions)
        types = model_types(recipe.referenced_models(), self._options)
        # Held for the life of this process, which does nothing else.
        self._types = ExitStack()
        self._types.enter_context(host.plain_configurations(types))
        self._prepared = Prepared.of(recipe, self._options, [self._take])
        self._units = {unit.name: unit for unit in self._prepared.units.units}
        self._writer = _shared(Path(path), token, self._prepared.layout)
        self._computing = threading.Lock()

    def node(self) -> str:
        """Return the id of the node, in short."""
        import ray

        return str(ray.get_runtime_context().get_node_id())[:8]

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
            record = record.model_copy(update={"node": self.node()})
        if self._writer is not None:
            return Computed(name, self._writer.write(name, tensor), None, record)
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
        import ray

        self._ray = ray
        self._prepared = prepared
        token = secrets.token_hex(16)
        (path / _TOKEN).write_text(token, "utf-8")
        self._token = path / _TOKEN
        cpus = ray_options.cpus or 1
        on_gpu = bool(options.device and options.device != "cpu")
        gpus = ray_options.gpus if ray_options.gpus is not None else float(on_gpu)
        count = _room(ray.cluster_resources(), cpus, gpus)
        # Every lost worker is started again, and what it had is done again.
        remote = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1, max_concurrency=_IN_FLIGHT
        )(Worker)
        revisions = {
            str(model): folder.name
            for model in prepared.models
            if (folder := Path(host.folder_of(model))).parent.name == "snapshots"
        }
        arguments = (
            prepared.config.model_dump(mode="json"), options.model_dump(), revisions, str(path), token,
        )  # fmt: skip
        self._workers = [remote.remote(*arguments) for _ in range(min(count, len(prepared.units.units)))]

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
        waiting = sorted(units, key=cost)
        by_name = {unit.name: unit for unit in units}
        flying: dict[Any, Any] = {}
        decision = self._prepared.merge.decided()

        def fill(worker: Any) -> None:
            if waiting:
                flying[worker.compute.remote(waiting.pop().name, decision)] = worker

        for _ in range(_IN_FLIGHT):
            for worker in self._workers:
                fill(worker)
        while flying:
            done, _ = self._ray.wait(list(flying), num_returns=1)
            for reference in done:
                worker = flying.pop(reference)
                result: Computed = self._result(reference)
                fill(worker)
                unit = by_name[result.name]
                if result.tensor is not None:
                    write(unit, result.tensor, result.record)
                else:
                    written(unit, str(result.sha256), result.record)
                del result

    def align(self, layers: Any, exact: bool) -> Alignment:
        """Return the inner products of all tensors' updates: map over the workers, reduce here."""
        names = sorted(loader_for(self._prepared.merge.base).index.tensor_paths)
        size = max(1, -(-len(names) // (4 * len(self._workers))))
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        pool = self._ray.util.ActorPool(self._workers)
        found = list(pool.map(lambda worker, part: worker.align.remote(layers, exact, part), parts))
        return joined(found)

    def _result(self, reference: Any) -> Computed:
        try:
            result: Computed = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, MonoSoupError):
                raise type(cause)(str(cause)) from None
            raise OutputError(f"a worker failed: {cause or error}") from error
        except self._ray.exceptions.RayActorError as error:
            raise OutputError(f"the workers cannot be started: {error}") from error
        return result

    def close(self) -> None:
        """Let the workers go."""
        self._token.unlink(missing_ok=True)
        for worker in self._workers:
            self._ray.kill(worker)


def _room(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers a cluster has room for.

    Raises:
        ConfigurationError: for none.
    """
    count = int(resources.get("CPU", 0) // cpus)
    if gpus:
        count = min(count, int(resources.get("GPU", 0) // gpus))
    if count < 1:
        raise ConfigurationError(
            f"the cluster has {resources.get('CPU', 0):g} processors and {resources.get('GPU', 0):g} GPUs, "
            f"too few for a worker of {cpus:g} and {gpus:g}; ask for less by --ray-cpus and --ray-gpus"
        )
    return count


def _require_answer(address: str) -> None:
    """Refuse an address where nobody answers; Ray itself tries for minutes.

    Raises:
        ConfigurationError: there is no connection.
    """
    host_name, _, port = address.removeprefix("ray://").rpartition(":")
    if not host_name or not port.isdecimal():
        return
    try:
        socket.create_connection((host_name.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise ConfigurationError(
            f"no Ray cluster answers at {address!r} ({error.strerror or error}); start one with "
            "`ray start --head`, or pass --ray local"
        ) from error


@contextmanager
def connected(options: RayOptions) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine for the time of the merge.

    Raises:
        ConfigurationError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "--ray needs Ray, which is not installed; pip install 'mergekit-monosoup[ray]'"
        ) from error
    own = not ray.is_initialized()
    if own:
        _require_answer(options.address)
        where: dict[str, Any] = {"include_dashboard": False} if options.address == "local" else {}
        try:
            ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR, **where)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigurationError(
                f"no Ray cluster answers at {options.address!r} ({error}); start one with "
                "`ray start --head`, or pass --ray local"
            ) from error
    try:
        yield
    finally:
        if own:
            ray.shutdown()
