"""Threads that share the work of one edit on the CPU.

BLAS and torch each bring threads of their own, and the idle ones of torch take the cores from the other
(measured: up to twice the time on two cores). Here the cores are shared out in Python instead: every thread
converts its blocks and multiplies them while they lie in its cache, with BLAS and torch kept to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import torch
from threadpoolctl import OpenBLASController, ThreadpoolController

from mergekit_monosoup.spectral.idle import threads_sleep
from mergekit_monosoup.spectral.process_setting import ProcessSetting

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

        The function lets the others work only while it is in torch, in `compiled` or in large NumPy
        operations. After an error no further item is begun.
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
                try:
                    results[i] = function(tasks[i])
                except BaseException:
                    rest.clear()
                    raise

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
                wait(helpers)
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
def torch_threads(count: int) -> Iterator[None]:
    """Let torch have this many threads, a setting of the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def at_work(device: torch.device, entries: int | None = None) -> Iterator[None]:
    """Call a crew as large as torch's number of threads and keep torch to one; off the CPU, do nothing.

    Args:
        device: where the matrices lie.
        entries: of the tensor: small ones are no work for many. Absent: as many threads as there are.
    """
    if device.type != "cpu":
        yield
        return
    size = torch.get_num_threads()
    if entries is not None:
        size = min(size, entries // _SHARE)
    with torch_threads(1):
        if size <= 1:
            with _ONE_BLAS_THREAD:
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


def _limit_blas() -> Callable[[], object]:
    _let_any_thread_limit()
    limited = _libraries().limit(limits=1)
    _let_any_thread_limit()

    def restore() -> None:
        _let_any_thread_limit()
        limited.restore_original_limits()
        _let_any_thread_limit()

    return restore


def _let_any_thread_limit() -> None:
    """Newer versions of threadpoolctl let one thread alone change the number, until it is said to be done."""
    clear = getattr(OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


_ONE_BLAS_THREAD = ProcessSetting(_limit_blas)
