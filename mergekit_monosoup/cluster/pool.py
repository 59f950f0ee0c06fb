"""Workers of one kind on a Ray cluster, and the jobs that they have in hand.

What a command does on many machines is a class whose methods each do one job: `merging.on_ray.Worker` for
units of a merge, `inspection_on_ray.Inspector` for tensors of an inspection. Ray starts a lost worker again
and does again what it had, so a job must come to the same when it is done twice.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_monosoup.cluster.connection import RayOptions
from mergekit_monosoup.errors import ConfigurationError, MonoSoupError, OutputError

# Of each worker: one job that is computed, and one whose inputs are read meanwhile.
IN_FLIGHT = 2
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Pool:
    """As many workers as a cluster has room for; `connected` is around all of it."""

    def __init__(
        self,
        kind: type,
        arguments: Sequence[Any],
        options: RayOptions,
        *,
        most: int,
        on_gpu: bool,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        """Start the workers; they are created while the first jobs wait for them.

        Args:
            kind: class of a worker, which Ray imports by its name.
            arguments: that each worker is made with.
            options: what a worker takes of the cluster.
            most: workers, where there is room for more.
            on_gpu: whether a worker takes a GPU where the options do not say.
            in_flight: jobs that a worker has at a time.

        Raises:
            ConfigurationError: there is room for none.
        """
        import ray

        self._ray = ray
        cpus = options.cpus or 1
        gpus = options.gpus if options.gpus is not None else float(on_gpu)
        count = _room(ray.cluster_resources(), cpus, gpus)
        # Every lost worker is started again, and what it had is done again.
        remote = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1, max_concurrency=in_flight
        )(kind)
        self._in_flight = in_flight
        self._workers = [remote.remote(*arguments) for _ in range(max(1, min(count, most)))]

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def each(self, method: str, jobs: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """Do jobs in their order, a few on each worker at a time, and yield what comes of them as it comes.

        Args:
            method: of the workers that does a job.
            jobs: the arguments of each; taken from one by one as workers are free.

        Raises:
            MonoSoupError: of the first job that fails, as it would be raised here.
        """
        waiting = iter(jobs)
        flying: dict[Any, Any] = {}

        def fill(worker: Any) -> None:
            for arguments in waiting:
                flying[getattr(worker, method).remote(*arguments)] = worker
                return

        for _ in range(self._in_flight):
            for worker in self._workers:
                fill(worker)
        while flying:
            done, _ = self._ray.wait(list(flying), num_returns=1)
            for reference in done:
                worker = flying.pop(reference)
                result = self._result(reference)
                fill(worker)
                # Nothing here holds on to what may be a large tensor in the object store.
                del reference
                yield result
                del result
            done.clear()

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, MonoSoupError):
                raise type(cause)(str(cause)) from None
            raise OutputError(f"a worker failed: {cause or error}") from error
        except self._ray.exceptions.RayActorError as error:
            raise OutputError(f"the workers cannot be started: {error}") from error

    def on_all(self, method: str) -> None:
        """Call a method of every worker, and wait for all; a worker that is lost meanwhile is left out."""
        for reference in [getattr(worker, method).remote() for worker in self._workers]:
            with suppress(self._ray.exceptions.RayError):
                self._ray.get(reference)

    def close(self) -> None:
        """Let the workers go."""
        for worker in self._workers:
            self._ray.kill(worker)


def node() -> str:
    """Return the id of the node that a worker runs on, in short."""
    import ray

    return str(ray.get_runtime_context().get_node_id())[:8]


@dataclass(frozen=True)
class Driver:
    """The process that workers work for: its folder, and what tells its machine from others."""

    folder: str
    kernel: str

    @classmethod
    def here(cls) -> Driver:
        """Return this process."""
        return cls(os.getcwd(), _running_kernel())

    def follow(self) -> None:
        """Work in the driver's folder, where there is one, so that relative paths mean the same."""
        with suppress(OSError):
            os.chdir(self.folder)

    def shares_memory(self) -> bool:
        """Say whether this process is on the driver's machine, and so has its cache of the disk."""
        return self.kernel == _running_kernel()


def _running_kernel() -> str:
    try:
        return _BOOT.read_text("ascii").strip()
    except OSError:
        return platform.node()


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
