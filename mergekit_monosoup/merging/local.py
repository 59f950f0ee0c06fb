"""Run the units of a merge in this process: reading, computing and writing overlap."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any, TypeVar

import psutil
import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.merging.lanes import COPIES, Lane, lanes
from mergekit_monosoup.merging.room import Room
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

    A thread reads ahead, some compute, each on a core or a stream of its own, and one writes. A unit is
    never shared out among cores: so its result does not depend on how many there are. What is held at a
    time is bounded by the largest units and by the memory that is free, however many units there are.

    Args:
        planned: what the units belong to.
        units: those to compute, in order.
        options: devices and threads, as mergekit has them.
        write: stores a tensor; called from one thread at a time.

    Raises:
        What computing or writing raises first; the units under way are finished before.
    """
    places = lanes(options)
    on_cpu = places[0].device.type == "cpu"
    storage = options.device if options.low_cpu_memory else "cpu"
    free = psutil.virtual_memory().available // (2 * COPIES)
    room = Room(min((len(places) + 1) * max(map(_bytes, units), default=0), free))

    def prepare() -> None:
        # mergekit keeps the options of its loaders by thread, torch its number of threads.
        LoaderCache().setup(options=options)
        if on_cpu:
            torch.set_num_threads(1)

    def work(lane: Lane) -> None:
        for unit, values in ahead:
            with lane.taken(_bytes(unit), values.values()):
                tensor = compute(
                    unit, planned, values, math_device=lane.device, storage_device=storage or "cpu"
                )
            del values
            # A disk that is full stops the merge here, not at its end.
            if written and written[-1].done():
                written[-1].result()
            written.append(writer.submit(store, unit, tensor))

    def store(unit: Unit, tensor: Tensor) -> None:
        try:
            write(unit, tensor)
        finally:
            room.leave(_bytes(unit))

    written: list[Future[None]] = []
    with (
        _Ahead(_read(units, room, prepare)) as ahead,
        ThreadPoolExecutor(1, "monosoup-write") as writer,
        ThreadPoolExecutor(len(places), "monosoup-compute", prepare) as computing,
    ):
        try:
            for worker in as_completed([computing.submit(work, lane) for lane in places]):
                worker.result()
        except BaseException:
            # Also when the user interrupts: the other threads end with the units they have.
            ahead.stop()
            for held in (room, *(lane.room for lane in places)):
                held.open()
            raise
    for part in written:
        part.result()


def _bytes(unit: Unit) -> int:
    return unit.size * unit.dtype.itemsize


def _read(
    units: Iterable[Unit], room: Room, prepare: Callable[[], None]
) -> Iterator[tuple[Unit, Mapping[Task[Any], Any]]]:
    prepare()
    mapped = 0
    for unit in units:
        room.enter(_bytes(unit))
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


class _Ahead(Iterator[T]):
    """Iterate in a thread of its own, one item ahead, for several threads; what it raises is raised here."""

    def __init__(self, items: Iterator[T]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="monosoup-read", daemon=True)

    def stop(self) -> None:
        """Give out no further items."""
        self._stopped.set()

    def __enter__(self) -> _Ahead[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        # Make room for what it has read meanwhile, and for its last word.
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._thread.join()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._queue.put((item, None))
                if self._stopped.is_set():
                    break
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that asks
            self._queue.put((None, error))
        else:
            self._queue.put((None, StopIteration()))

    def __next__(self) -> T:
        if self._stopped.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            # For the other threads that ask.
            self._stopped.set()
            self._queue.put((None, StopIteration()))
            raise error
        value: T = item
        return value
