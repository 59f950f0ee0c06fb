"""A journal of evaluations, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_monosoup.errors import InputError

LOG = logging.getLogger(__name__)


class Journal:
    """Scores by key, in a file of one JSON object a line that only ever grows."""

    def __init__(self, file: Path) -> None:
        """Read the journal; a missing file is an empty one.

        Raises:
            InputError: a line other than the last is not an entry.
        """
        self.file = file
        self._scores: dict[str, float] = {}
        self._details: dict[str, Mapping[str, Any]] = {}
        if not file.exists():
            return
        lines = file.read_text("utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                key, score = entry["key"], float(entry["score"])
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    LOG.warning("%s: the last line is incomplete and is dropped", file)
                    self._drop_last(line)
                    continue
                raise InputError(f"{file}, line {number} is not an entry; move the file away") from error
            self._scores[key] = score
            self._details[key] = entry

    def score(self, key: str) -> float | None:
        """Return the score of a key, or None."""
        return self._scores.get(key)

    def details(self, key: str) -> Mapping[str, Any]:
        """Return what else the entry of a key says, nothing where there is none."""
        return self._details.get(key, {})

    def add(self, key: str, score: float, **details: Any) -> None:
        """Write an entry and wait until it is on the disk."""
        if not math.isfinite(score):
            raise ValueError(f"score {score} is not finite")
        line = json.dumps({"key": key, "score": score, **details}) + "\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._scores[key] = score
        self._details[key] = details

    def _drop_last(self, line: str) -> None:
        with self.file.open("r+b") as file:
            file.truncate(self.file.stat().st_size - len(line.encode()))
