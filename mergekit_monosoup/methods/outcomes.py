"""What became of each tensor, for whoever asks in this thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from mergekit_monosoup.spectral.edit import EditRecord

Action = Literal["edited", "averaged", "kept", "copied", "left out"]


@dataclass(frozen=True)
class Outcome:
    """What was done with one tensor, and why; `edit` is there for edited ones."""

    tensor: str
    action: Action
    reason: str = ""
    edit: EditRecord | None = None


_listener: ContextVar[list[Outcome] | None] = ContextVar("_listener", default=None)


@contextmanager
def outcomes() -> Iterator[list[Outcome]]:
    """Collect the outcomes of the merges in this context."""
    collected: list[Outcome] = []
    token = _listener.set(collected)
    try:
        yield collected
    finally:
        _listener.reset(token)


def tell(outcome: Outcome) -> None:
    """Say what was done with a tensor; nobody may be listening."""
    collected = _listener.get()
    if collected is not None:
        collected.append(outcome)
