"""Run jobs that depend on each other, each once: what is done stays done, whatever interrupts the rest.

A job's result is a JSON file and, where it keeps one, a folder, both under a digest of everything that
the result depends on: function, arguments, stamp (of code and data) and the digests of the jobs that it
needs. A second start therefore repeats only what has changed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Seconds between two reports of a job's progress.
_BEAT = 0.5


class JobError(Exception):
    """Jobs failed; the message names each with its log."""


@dataclass(frozen=True)
class Done:
    """A finished job: what it returned, the folder that it kept, and its wall time in seconds."""

    value: dict[str, Any]
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Task:
    """What a job's function is given.

    `folder` and `scratch` exist and are empty: what is written into the one is kept, the other goes.
    """

    arguments: dict[str, Any]
    inputs: dict[str, Done]
    folder: Path
    scratch: Path
    progress: Callable[[int, int, float], None]


@dataclass(frozen=True, eq=False)
class Job:
    """One step. `function` is of a module's top level; `cost` is its expected time in seconds."""

    name: str
    function: Callable[[Task], dict[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Job] = field(default_factory=dict)
    stamp: str = ""
    cost: float = 1.0

    @cached_property
    def key(self) -> str:
        """Digest of everything that the result depends on."""
        content = {
            "function": f"{self.function.__module__}.{self.function.__qualname__}",
            "arguments": dict(self.arguments),
            "needs": {alias: job.key for alias, job in self.needs.items()},
            "stamp": self.stamp,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


class Store:
    """The work folder: results, what jobs keep, logs."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def result(self, key: str) -> Path:
        """File of a job's result."""
        return self.root / "results" / f"{key}.json"

    def folder(self, key: str) -> Path:
        """Folder that a job keeps."""
        return self.root / "kept" / key

    def log(self, key: str) -> Path:
        """File of what a job printed."""
        return self.root / "logs" / f"{key}.log"

    def done(self, key: str) -> Done | None:
        """Return a finished job, None if it is not."""
        try:
            content = json.loads(self.result(key).read_text("utf-8"))
        except FileNotFoundError:
            return None
        if content["keeps"] and not self.folder(key).is_dir():
            return None
        return Done(content["value"], self.folder(key), content["seconds"])

    def finished(self, key: str) -> Done:
        """Return a job that must be finished.

        Raises:
            FileNotFoundError: it is not.
        """
        found = self.done(key)
        if found is None:
            raise FileNotFoundError(f"{self.result(key)} or what belongs to it has been removed; start again")
        return found


def run_jobs(jobs: Sequence[Job], store: Store, workers: int = 2, quiet: bool = False) -> dict[Job, Done]:
    """Do what is not done yet, and return all of it.

    Args:
        jobs: all jobs, in any order; what they need is among them.
        store: where results are kept.
        workers: processes of one thread each; 0 works in this process.
        quiet: without progress.

    Raises:
        JobError: jobs failed. Everything that does not need them has been done.
    """
    known = {job.key: job for job in jobs}
    done = {key: found for key in known if (found := store.done(key)) is not None}
    pending = {key: job for key, job in known.items() if key not in done}
    failed: dict[str, str] = {}
    with _progress(sum(job.cost for job in pending.values()), quiet) as bar, _crew(workers) as crew:
        urgency = _urgency(list(known.values()))
        running: dict[Future[Done], Job] = {}
        while pending or running:
            # What needs a failed job never becomes ready.
            ready = [
                job for job in pending.values() if all(need.key in done for need in job.needs.values())
            ]
            ready.sort(key=lambda job: -urgency[job.key])
            for job in ready[: max(workers, 1) - len(running)]:
                del pending[job.key]
                running[crew.start(_Order.of(job, store))] = job
            if not running:
                break
            finished, _ = wait(running, timeout=_BEAT, return_when=FIRST_COMPLETED)
            bar.show(crew.news(), running.values())
            for future in finished:
                job = running.pop(future)
                if (error := future.exception()) is None:
                    done[job.key] = future.result()
                else:
                    failed[job.key] = f"{job.name} failed: {error}; see {store.log(job.key)}"
                    bar.say(failed[job.key])
                bar.finish(job)
    if failed:
        waiting = f"\n{len(pending)} other jobs need these." if pending else ""
        raise JobError("\n".join(failed.values()) + waiting)
    return {job: done[key] for key, job in known.items()}


def _urgency(jobs: Sequence[Job]) -> dict[str, float]:
    """Return for each job how long it and the longest chain of jobs that need it take."""
    after: dict[str, list[Job]] = {}
    for job in jobs:
        for need in job.needs.values():
            after.setdefault(need.key, []).append(job)
    urgency: dict[str, float] = {}

    def of(job: Job) -> float:
        if job.key not in urgency:
            urgency[job.key] = job.cost + max((of(other) for other in after.get(job.key, ())), default=0.0)
        return urgency[job.key]

    for job in jobs:
        of(job)
    return urgency


@dataclass(frozen=True)
class _Order:
    """A job as a worker gets it."""

    name: str
    key: str
    function: Callable[[Task], dict[str, Any]]
    arguments: dict[str, Any]
    needs: dict[str, str]
    root: Path

    @classmethod
    def of(cls, job: Job, store: Store) -> _Order:
        needs = {alias: need.key for alias, need in job.needs.items()}
        return cls(job.name, job.key, job.function, dict(job.arguments), needs, store.root)


def _execute(order: _Order, tell: Callable[[Any], None]) -> Done:
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
        if (now := time.monotonic()) - last > _BEAT:
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


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


@contextmanager
def _logged(log: Path, name: str) -> Iterator[None]:
    """Send what this process and its children print to a file, a failure's traceback too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        print(name, file=file, flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
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


class _Here:
    """Work in this process, one job after the other."""

    def __init__(self) -> None:
        self._news: list[Any] = []

    def start(self, order: _Order) -> Future[Done]:
        future: Future[Done] = Future()
        try:
            future.set_result(_execute(order, self._news.append))
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the job and is reported with it
            future.set_exception(error)
        return future

    def news(self) -> list[Any]:
        told, self._news = self._news, []
        return told


_tell: Callable[[Any], None] = print


def _enlist(queue: Any) -> None:
    """Prepare a worker."""
    global _tell
    _tell = queue.put
    import torch

    torch.set_num_threads(1)


def _execute_in_worker(order: _Order) -> Done:
    return _execute(order, _tell)


class _Workers:
    """Work in other processes."""

    def __init__(self, count: int) -> None:
        # Not forked: torch's threads do not survive that.
        context = multiprocessing.get_context("spawn")
        self._queue = context.SimpleQueue()
        self.executor = ProcessPoolExecutor(count, context, initializer=_enlist, initargs=(self._queue,))

    def start(self, order: _Order) -> Future[Done]:
        return self.executor.submit(_execute_in_worker, order)

    def news(self) -> list[Any]:
        told = []
        while not self._queue.empty():
            told.append(self._queue.get())
        return told


@contextmanager
def _crew(workers: int) -> Iterator[_Here | _Workers]:
    if workers == 0:
        yield _Here()
        return
    # Inherited by the workers and by the commands that they start.
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(dict.fromkeys(threads, "1"))
    crew = _Workers(workers)
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


class _Bar:
    """Seconds of work done of those expected."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        self._shares: dict[str, float] = {}
        self._lines: dict[str, str] = {}

    def show(self, news: Sequence[Any], running: Any) -> None:
        costs = {job.key: job.cost for job in running}
        for key, share, line in news:
            self._lines[key] = line
            if key in costs:
                self._advance(key, share * costs[key])
        self._bar.set_postfix_str("; ".join(self._lines.get(key, "") for key in costs), refresh=False)

    def finish(self, job: Job) -> None:
        self._advance(job.key, job.cost)

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    def _advance(self, key: str, reached: float) -> None:
        self._bar.update(reached - self._shares.get(key, 0.0))
        self._shares[key] = reached


@contextmanager
def _progress(total: float, quiet: bool) -> Iterator[_Bar]:
    layout = "{percentage:3.0f} % |{bar:20}| {elapsed} of about {elapsed}+{remaining} {postfix}"
    # In a log file a line every half minute will do.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=total, bar_format=layout, disable=quiet, mininterval=interval, maxinterval=interval
    ) as bar:
        yield _Bar(bar)
