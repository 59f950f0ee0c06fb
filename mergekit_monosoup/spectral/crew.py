"""Threads that share the work of one edit on the CPU.

BLAS and torch each bring threads of their own, and the idle ones of torch take the cores from the other
(measured: up to twice the time on two cores). Here the cores are shared out in Python instead: every thread
converts its blocks and multiplies them while they lie in its cache, with BLAS and torch kept to one thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

from mergekit_monosoup.spectral.idle import threads_sleep

# Entries of a tensor for which a further thread is worth its while.
_SHARE = 1 << 16

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crew:
    """The calling thread and some others, or the calling thread alone.

    Args:
        pool: the others.
        size: how many they are with the calling thread.
    """

    def __init__(self, pool: ThreadPoolExecutor | None = None, size: int = 1) -> None:
        self._pool = pool
        self.size = size

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return function(item) of all items, in their order; BLAS has one thread meanwhile.

        The function leaves the cores to others only while it is in torch or in `compiled`.
        """
        tasks = list(items)
        if self._pool is None or len(tasks) < 2:
            return [function(item) for item in tasks]
        inference = torch.is_inference_mode_enabled()
        results: list[Any] = [None] * len(tasks)
        rest = deque(range(len(tasks)))

        def work() -> None:
            while True:
                try:
                    i = rest.popleft()
                except IndexError:
                    return
                results[i] = function(tasks[i])

        def help_out() -> None:
            # Both are settings of a thread.
            with torch.inference_mode(inference), torch.no_grad():
                work()

        with _ONE_BLAS_THREAD:
            helpers = [self._pool.submit(help_out) for _ in range(min(self.size, len(tasks)) - 1)]
            # What the function maps in its turn is done by its own thread.
            token = _CURRENT.set(_ALONE)
            try:
                work()
            finally:
                _CURRENT.reset(token)
                for helper in helpers:
                    helper.result()
        return results

    def sum(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Any:
        """Return the sum of function(item), added up in the order of the items; few are held at a time."""
        total: Any = None
        tasks = list(items)
        for start in range(0, len(tasks), self.size):
            for part in self.map(function, tasks[start : start + self.size]):
                total = part if total is None else total + part
        return total


_ALONE = Crew()
_CURRENT: ContextVar[Crew] = ContextVar("crew", default=_ALONE)


def crew() -> Crew:
    """Return the crew of the edit that is being done, or one without threads."""
    return _CURRENT.get()


@contextmanager
def with_blas_threads(worthwhile: bool) -> Iterator[None]:
    """Let BLAS have its own threads for work that the crew cannot share out, where that pays.

    Where they keep spinning afterwards, they take more from the crew than they bring, unless the work is
    `worthwhile`: longer than they spin.
    """
    if worthwhile or threads_sleep():
        yield
    else:
        with _ONE_BLAS_THREAD:
            yield


@contextmanager
def one_torch_thread(device: torch.device) -> Iterator[None]:
    """Keep torch to one thread; off the CPU, do nothing."""
    with _ONE_TORCH_THREAD if device.type == "cpu" else nullcontext():
        yield


@contextmanager
def at_work(device: torch.device, entries: int) -> Iterator[None]:
    """Call a crew as large as torch's number of threads and keep torch to one; off the CPU, do nothing.

    Args:
        device: where the matrices lie.
        entries: of the tensor: small ones are no work for many.
    """
    size = min(torch.get_num_threads(), entries // _SHARE) if device.type == "cpu" else 1
    with one_torch_thread(device):
        if size <= 1:
            yield
            return
        with ThreadPoolExecutor(size - 1, "edit", _begin) as pool:
            token = _CURRENT.set(Crew(pool, size))
            try:
                yield
            finally:
                _CURRENT.reset(token)


def _begin() -> None:
    torch.set_num_threads(1)


class _Shared:
    """A setting of the whole process, changed by the first who needs it and restored by the last."""

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._users = 0
        self._restore: Callable[[], object] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._restore = self._change()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _limit_blas() -> Callable[[], object]:
    limited = _libraries().limit(limits=1, user_api="blas")
    return lambda: limited.restore_original_limits()


def _limit_torch() -> Callable[[], object]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(before)


_ONE_BLAS_THREAD = _Shared(_limit_blas)
_ONE_TORCH_THREAD = _Shared(_limit_torch)
