"""Settings of the whole process that several threads may need at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ProcessSetting:
    """A setting that the first who needs it changes and the last who needs it restores.

    The last may be another thread than the first.

    Args:
        change: changes it, and returns what restores it.
    """

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
