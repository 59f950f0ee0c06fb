"""What a run has finished, line by line, so that another can go on where it was interrupted."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.output import JOURNAL, told
from mergekit_monosoup.checkpoint.output import sync as sync_path
from mergekit_monosoup.errors import ConfigurationError, InputError

NAME = JOURNAL
_BEGIN_AGAIN = "begin again with --restart"
# What a kill may cost. A flush waits for the disk, and the disk has to take all bytes some time anyway.
_SECONDS = 0.5


@dataclass(frozen=True)
class Done:
    """One finished tensor: the hash of its bytes, and its record as JSON where there is one."""

    tensor: str
    sha256: str
    record: dict[str, Any] | None = None


class Journal:
    """An append-only file: what the run is, then one line for each tensor that lies in its place.

    A line reaches the file only after the bytes that it speaks of have reached the disk. Lines wait for
    that together, so that the disk is not asked for every tensor. An interrupted run has lost what it did
    within half a second, and its journal promises nothing that is not there.
    """

    def __init__(
        self, file: Path, fingerprint: Mapping[str, Any], sync: Callable[[], None] = lambda: None
    ) -> None:
        """Begin a journal, replacing what lies there.

        Args:
            file: of the journal.
            fingerprint: what a run that goes on with this one must share with it; JSON.
            sync: waits until the tensors written so far are on the disk.
        """
        self._begin(file, sync)
        with told(file):
            file.unlink(missing_ok=True)
            self._stream = file.open("xb", buffering=0)
            self._append([json.dumps({"fingerprint": fingerprint})])
            sync_path(file.parent)

    @classmethod
    def resume(
        cls, file: Path, fingerprint: Mapping[str, Any], sync: Callable[[], None] = lambda: None
    ) -> Journal:
        """Go on with a journal; begin one where a run was interrupted before it had begun it.

        A last line that was cut off is removed.

        Raises:
            ConfigurationError: it is of another run; says what has changed.
            InputError: it is damaged; names file and line.
        """
        content = _content(file)
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return cls(file, fingerprint, sync)
        journal = cls.__new__(cls)
        journal._begin(file, sync)
        lines = whole.split(b"\n")[:-1]
        before = _parsed(file, 1, lines[0]).get("fingerprint")
        if not isinstance(before, dict):
            raise InputError(f"{file}, line 1 does not say what was begun; {_BEGIN_AGAIN}")
        changed = _difference(before, json.loads(json.dumps(fingerprint)))
        if changed is not None:
            raise ConfigurationError(
                f"{file.parent} holds another merge: {changed}; put it back as it was, or {_BEGIN_AGAIN}"
            )
        for number, line in enumerate(lines[1:], 2):
            journal._take(number, _parsed(file, number, line))
        with told(file):
            if len(whole) < len(content):
                os.truncate(file, len(whole))
            journal._stream = file.open("ab", buffering=0)
        return journal

    def _begin(self, file: Path, sync: Callable[[], None]) -> None:
        self.file = file
        self.kept: dict[str, Done] = {}
        self.notes: list[str] = []
        self._sync = sync
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._flushed = time.monotonic()
        self._failed = False

    def _take(self, number: int, line: Mapping[str, Any]) -> None:
        match line:
            case {"tensor": str(name), "sha256": str(sha256), "record": dict() | None as record}:
                self.kept[name] = Done(name, sha256, record)
            case {"note": str(note)}:
                self.notes.append(note)
            case _:
                raise InputError(f"{self.file}, line {number} is not a line of a journal; {_BEGIN_AGAIN}")

    def recheck(
        self, stored_hash: Callable[[str], str], seen: Callable[[str], None] = lambda name: None
    ) -> list[str]:
        """Hash again what the journal says is there; return what is not, and drop it from `kept`.

        Args:
            stored_hash: of a tensor's bytes as they lie in the file.
            seen: called for each tensor that is looked at.
        """
        lost = []
        for name, done in list(self.kept.items()):
            if stored_hash(name) != done.sha256:
                lost.append(name)
                del self.kept[name]
            seen(name)
        return lost

    def add(self, done: Done) -> None:
        """Take note of a tensor that was written into its place; from any thread."""
        self._enqueue({"tensor": done.tensor, "sha256": done.sha256, "record": done.record})

    def note(self, text: str) -> None:
        """Keep a sentence about the whole merge."""
        with self._lock:
            if text in self.notes:
                return
            self.notes.append(text)
        self._enqueue({"note": text})

    def _enqueue(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line)
        with self._lock:
            self._waiting.append(text)
            due = time.monotonic() - self._flushed >= _SECONDS
        # One thread waits for the disk; the others go on meanwhile.
        if due and self._flushing.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._flushing.release()

    def flush(self) -> None:
        """Wait until all that was added is on the disk."""
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines, self._waiting = self._waiting, []
        if lines and not self._failed:
            # A disk that has failed once may call the next attempt a success although bytes are lost: from
            # then on nothing can be promised.
            self._failed = True
            self._sync()
            with told(self.file):
                self._append(lines)
            self._failed = False
        self._flushed = time.monotonic()

    def _append(self, lines: list[str]) -> None:
        rest = memoryview("".join(f"{line}\n" for line in lines).encode())
        begin = self._stream.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[self._stream.write(rest) or 0 :]
            os.fsync(self._stream.fileno())
        except BaseException:
            # A part of a line must not swallow the beginning of the next.
            os.ftruncate(self._stream.fileno(), begin)
            raise

    def close(self) -> None:
        """Write what is waiting, and close the file; safe to call again."""
        if not self._stream.closed:
            try:
                self.flush()
            finally:
                self._stream.close()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); {_BEGIN_AGAIN}") from error


def _parsed(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}, line {number} is damaged; {_BEGIN_AGAIN}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}, line {number} is not a line of a journal; {_BEGIN_AGAIN}")
    return value


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str | None:
    """Return in words the first thing that differs, None where nothing does."""
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        label = f"{where}{key}"
        if old == new and (key in before) == (key in now):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, f"{label}, ")
        if key not in now:
            return f"{label} is gone"
        if key not in before:
            return f"{label} is new"
        plain = all(isinstance(value, str | int | float | None) for value in (old, new))
        if plain and len(f"{old}{new}") < 100 and "\n" not in f"{old}{new}":
            return f"{label} was {old} and is {new}"
        return f"{label} has changed"
    return None
