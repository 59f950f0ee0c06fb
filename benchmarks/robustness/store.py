"""Jobs, and the work folder that remembers what is done.

A job's result is a JSON file and, where it keeps one, a folder, both under a digest of everything that
the result depends on: function, arguments, stamp (of code and data) and the digests of the jobs that it
needs. A second start therefore repeats only what has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any


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


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)
