"""Run the units of a merge in this process: reading, computing and writing overlap."""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.merging.units import PlannedUnits, Unit, compute

T = TypeVar("T")

# Loaders map files into memory; after so many bytes they let go of them, so that what has been read
# does not stay resident.
_MAPPED_BYTES = 1 << 28
_PAGE = 4096


def run_units(
    planned: PlannedUnits,
    units: Sequence[Unit],
    options: MergeOptions,
    write: Callable[[Unit, Tensor], None],
) -> None:
    """Compute units and hand each to `write` when it is done.

    One unit is read and one is written while one is computed on each device: three at most are in
    memory a device.

    Args:
        planned: what the units belong to.
        units: those to compute, in order.
        options: devices and threads, as mergekit has them.
        write: stores a tensor; called from one thread at a time.
    """
    devices = _devices(options)
    storage = options.device if options.low_cpu_memory else "cpu"
    lock = threading.Lock()

    def store(unit: Unit, tensor: Tensor) -> None:
        with lock:
            write(unit, tensor)

    def work(device: str | torch.device, part: Sequence[Unit]) -> None:
        with _ahead(_read(part, options)) as loaded, ThreadPoolExecutor(1, "monosoup-write") as writer:
            last = None
            for unit, values in loaded:
                seed = options.random_seed
                if seed is not None:
                    # By name: the result does not depend on what was computed before it.
                    torch.manual_seed(seed ^ _stable_hash(unit.name))
                tensor = compute(unit, planned, values, math_device=device, storage_device=storage or "cpu")
                del values
                if last is not None:
                    last.result()
                last = writer.submit(store, unit, tensor)
                del tensor
            if last is not None:
                last.result()

    if len(devices) == 1:
        work(devices[0], units)
        return
    with ThreadPoolExecutor(len(devices), "monosoup-device") as pool:
        # Largest first, dealt out in turn: the devices end at about the same time.
        ordered = sorted(units, key=lambda unit: -unit.size)
        for done in [pool.submit(work, d, ordered[i :: len(devices)]) for i, d in enumerate(devices)]:
            done.result()


def _devices(options: MergeOptions) -> list[str | torch.device]:
    if not options.multi_gpu:
        return [options.device or "cpu"]
    from mergekit.common import get_torch_accelerator_count, get_torch_accelerator_type

    kind = get_torch_accelerator_type(options.device)
    return [torch.device(kind, i) for i in range(get_torch_accelerator_count(options.device))] or ["cpu"]


def _read(units: Iterable[Unit], options: MergeOptions) -> Iterator[tuple[Unit, Mapping[Task[Any], Any]]]:
    # mergekit keeps the options of its loaders by thread.
    LoaderCache().setup(options=options)
    mapped = 0
    for unit in units:
        values = {task: task.execute() for task in host.inputs_of(unit.task)}
        mapped += sum(_touch(tensor) for tensor in values.values() if tensor is not None)
        if mapped > _MAPPED_BYTES:
            LoaderCache().flush_all()
            mapped = 0
        yield unit, values


def _touch(tensor: Tensor) -> int:
    """Have the pages of a mapped tensor read; return its size in bytes."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and tensor.is_contiguous() and size:
        tensor.reshape(-1).view(torch.uint8)[::_PAGE].any()
    return size


def _stable_hash(name: str) -> int:
    return zlib.crc32(name.encode())


class _ahead(Iterator[T]):
    """Iterate in a thread of its own, one item ahead; what it raises is raised here."""

    def __init__(self, items: Iterator[T]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="monosoup-read", daemon=True)

    def __enter__(self) -> _ahead[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # Make room for what it has read meanwhile, and for its last word.
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._thread.join()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._queue.put((item, None))
                if self._stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that asks
            self._queue.put((None, error))
        else:
            self._queue.put((None, StopIteration()))

    def __next__(self) -> T:
        item, error = self._queue.get()
        if error is not None:
            raise error
        value: T = item
        return value
