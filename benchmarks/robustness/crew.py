"""Who does jobs: this process, or workers of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.robustness.store import Done, Job, Store, Task, write_json

# Seconds between two reports of a job's progress.
BEAT = 0.5


@dataclass(frozen=True)
class Order:
    """A job as a worker gets it."""

    name: str
    key: str
    function: Callable[[Task], dict[str, Any]]
    arguments: dict[str, Any]
    needs: dict[str, str]
    root: Path

    @classmethod
    def of(cls, job: Job, store: Store) -> Order:
        """Return the order for a job."""
        needs = {alias: need.key for alias, need in job.needs.items()}
        return cls(job.name, job.key, job.function, dict(job.arguments), needs, store.root)


def _execute(order: Order, tell: Callable[[Any], None]) -> Done:
    store = Store(order.root)
    folder = store.folder(order.key)
    part, scratch = folder.with_name(f"{folder.name}.part"), store.root / "scratch" / order.key
    for path in (folder, part, scratch):
        shutil.rmtree(path, ignore_errors=True)
    part.mkdir(parents=True)
    scratch.mkdir(parents=True)
    inputs = {alias: store.finished(key) for alias, key in order.needs.items()}
    last = 0.0

    def progress(step: int, steps: int, loss: float) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > BEAT:
            last = now
            tell((order.key, step / steps, f"{order.name} {step}/{steps} {loss:.3f}"))

    tell((order.key, 0.0, order.name))
    started = time.monotonic()
    try:
        with _logged(store.log(order.key), order.name):
            value = order.function(Task(order.arguments, inputs, part, scratch, progress))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds = time.monotonic() - started
    keeps = any(part.iterdir())
    if keeps:
        part.rename(folder)
    else:
        part.rmdir()
    content = {"name": order.name, "value": value, "keeps": keeps, "seconds": seconds}
    write_json(store.result(order.key), content)
    return Done(value, folder, seconds)


@contextmanager
def _logged(log: Path, name: str) -> Iterator[None]:
    """Send what this process and its children print to a file, a failure's traceback too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8", buffering=1) as file:
        print(name, file=file, flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            with redirect_stdout(file), redirect_stderr(file):
                yield
        except Exception:
            traceback.print_exc(file=file)
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)


class Here:
    """Work in this process, one job after the other."""

    def __init__(self) -> None:
        self._news: list[Any] = []

    def start(self, order: Order) -> Future[Done]:
        """Do the job at once."""
        future: Future[Done] = Future()
        try:
            future.set_result(_execute(order, self._news.append))
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the job and is reported with it
            future.set_exception(error)
        return future

    def news(self) -> list[Any]:
        """Return what has been told since the last time: key, share done, a line."""
        told, self._news = self._news, []
        return told


_tell: Callable[[Any], None] = print


def _enlist(queue: Any) -> None:
    """Prepare a worker."""
    global _tell
    _tell = queue.put
    import torch

    torch.set_num_threads(1)


def _execute_in_worker(order: Order) -> Done:
    return _execute(order, _tell)


class Workers:
    """Work in other processes."""

    def __init__(self, count: int) -> None:
        # Not forked: torch's threads do not survive that.
        context = multiprocessing.get_context("spawn")
        self._queue = context.SimpleQueue()
        self.executor = ProcessPoolExecutor(count, context, initializer=_enlist, initargs=(self._queue,))

    def start(self, order: Order) -> Future[Done]:
        """Hand the job to the next free worker."""
        return self.executor.submit(_execute_in_worker, order)

    def news(self) -> list[Any]:
        """Return what has been told since the last time: key, share done, a line."""
        told = []
        while not self._queue.empty():
            told.append(self._queue.get())
        return told


@contextmanager
def crew_of(workers: int) -> Iterator[Here | Workers]:
    """Yield who does the jobs: so many worker processes, or for 0 this one."""
    if workers == 0:
        yield Here()
        return
    # Inherited by the workers and by the commands that they start.
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(dict.fromkeys(threads, "1"))
    crew = Workers(workers)
    try:
        yield crew
    except BaseException:
        # Ctrl-C among others: results are whole or not there, so nothing is lost but the running jobs.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        crew.executor.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
