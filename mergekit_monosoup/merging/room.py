"""How much memory the tensors in hand may take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """A bound on the bytes in flight; a unit larger than all of it goes alone."""

    def __init__(self, size: int) -> None:
        """Take the number of bytes."""
        self._size = size
        self._held = 0
        self._open = False
        self._changed = threading.Condition()

    def enter(self, size: int) -> None:
        """Wait until there is room for so many bytes, and take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or not self._held or self._held + size <= self._size)
            self._held += size

    def leave(self, size: int) -> None:
        """Give room back."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    def open(self) -> None:
        """Let everybody in: the work is given up."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Hold room for as long as it is needed."""
        self.enter(size)
        try:
            yield
        finally:
            self.leave(size)
