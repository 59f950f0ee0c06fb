"""What a run has finished, line by line, so that another can go on where it was interrupted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_monosoup.errors import ConfigurationError

NAME = "monosoup_journal.jsonl"


@dataclass(frozen=True)
class Done:
    """One finished tensor: the hash of its bytes, and its record as JSON where there is one."""

    tensor: str
    sha256: str
    record: dict[str, Any] | None = None


class Journal:
    """An append-only file: what the run is, then one line for each tensor that lies in its place.

    Lines are handed to the operating system at once and survive a kill. After a loss of power a line may
    be there and its tensor not: so whoever goes on hashes what it keeps. A line that cannot be read is a
    tensor that is computed again.
    """

    def __init__(self, file: Path, fingerprint: Mapping[str, Any]) -> None:
        """Begin a journal, replacing what lies there."""
        self._lock = threading.Lock()
        self._stream = file.open("w", encoding="utf-8", buffering=1)
        self._write({"fingerprint": fingerprint})
        self.kept: dict[str, Done] = {}
        self.notes: list[str] = []

    @classmethod
    def resume(cls, file: Path, fingerprint: Mapping[str, Any]) -> Journal:
        """Go on with a journal.

        Raises:
            ConfigurationError: it is of another run; says what has changed.
        """
        lines = list(_lines(file))
        before = lines[0].get("fingerprint") if lines else None
        if not isinstance(before, dict):
            raise ConfigurationError(f"{file} does not say what was begun; begin again with --restart")
        changed = _difference(before, json.loads(json.dumps(fingerprint)))
        if changed is not None:
            raise ConfigurationError(
                f"{file.parent} holds another merge: {changed}; put it back as it was, or begin again with "
                "--restart"
            )
        journal = cls.__new__(cls)
        journal._lock = threading.Lock()
        # A line that was cut off must not swallow the next.
        journal._stream = file.open("a", encoding="utf-8", buffering=1)
        journal._stream.write("\n")
        journal.kept, journal.notes = {}, []
        for line in lines[1:]:
            if isinstance(line.get("note"), str):
                journal.notes.append(line["note"])
            elif isinstance(line.get("tensor"), str) and isinstance(line.get("sha256"), str):
                journal.kept[line["tensor"]] = Done(line["tensor"], line["sha256"], line.get("record"))
        return journal

    def add(self, done: Done) -> None:
        """Take note of a tensor that lies in its place."""
        self._write({"tensor": done.tensor, "sha256": done.sha256, "record": done.record})

    def note(self, text: str) -> None:
        """Keep a sentence about the whole merge."""
        if text not in self.notes:
            self.notes.append(text)
            self._write({"note": text})

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            self._stream.write(json.dumps(line) + "\n")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str | None:
    """Return in words the first thing that differs, None where nothing does."""
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        label = f"{where}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found = _difference(old, new, f"{label}, ")
            if found is not None:
                return found
        elif old != new:
            if isinstance(old, str | int | float | None) and isinstance(new, str | int | float | None):
                short = len(str(old)) + len(str(new)) < 100 and "\n" not in f"{old}{new}"
                if short:
                    return f"{label} was {old} and is {new}"
            return f"{label} has changed"
    return None
