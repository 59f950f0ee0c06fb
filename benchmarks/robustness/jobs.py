"""Run jobs that depend on each other, each once: what is done stays done, whatever interrupts the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from benchmarks.robustness.crew import BEAT, Order, crew_of
from benchmarks.robustness.store import Done, Job, Store


class JobError(Exception):
    """Jobs failed; the message names each with its log."""


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
    with _progress(sum(job.cost for job in pending.values()), quiet) as bar, crew_of(workers) as crew:
        urgency = _urgency(list(known.values()))
        running: dict[Future[Done], Job] = {}
        broken = False
        while running or (pending and not broken):
            # What needs a failed job never becomes ready.
            ready = [job for job in pending.values() if all(need.key in done for need in job.needs.values())]
            ready.sort(key=lambda job: -urgency[job.key])
            for job in ready[: 0 if broken else max(workers, 1) - len(running)]:
                del pending[job.key]
                running[crew.start(Order.of(job, store))] = job
            if not running:
                break
            finished, _ = wait(running, timeout=BEAT, return_when=FIRST_COMPLETED)
            bar.show(crew.news(), running.values())
            for future in finished:
                job = running.pop(future)
                if (error := future.exception()) is None:
                    done[job.key] = future.result()
                else:
                    failed[job.key] = f"{job.name} failed: {error}; see {store.log(job.key)}"
                    bar.say(failed[job.key])
                    # A worker was killed, say for want of memory: nobody is left to work.
                    broken |= isinstance(error, BrokenExecutor)
                bar.finish(job)
    if failed:
        waiting = f"\n{len(pending)} other jobs were not done." if pending else ""
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
        # Shown whenever the interval has passed, also while nothing advances.
        self._bar.update(0)

    def finish(self, job: Job) -> None:
        self._advance(job.key, job.cost)

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    def _advance(self, key: str, reached: float) -> None:
        step = reached - self._shares.get(key, 0.0)
        # Sums of floating-point numbers may end a hair above the total.
        self._bar.update(min(step, self._bar.total - self._bar.n))
        self._shares[key] = reached


@contextmanager
def _progress(total: float, quiet: bool) -> Iterator[_Bar]:
    layout = "{percentage:3.0f} % |{bar:20}| {elapsed}, about {remaining} to go {postfix}"
    # In a log file a line every half minute will do.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, bar_format=layout, disable=quiet, mininterval=interval, miniters=0) as bar:
        yield _Bar(bar)
