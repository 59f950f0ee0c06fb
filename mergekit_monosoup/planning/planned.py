"""The pieces of a plan: output slices with their sources, and planned tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_monosoup.checkpoint.headers import Checkpoint


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    tensor: str
    action: str
    shape: tuple[int, ...]
    dtype: str
    view: str
    why: str
    matrices: tuple[int, int, int] | None = None
    """Number, rows and columns of the matrices that will be decomposed."""
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    inputs: int = 0

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Source:
    """A model in one output slice, with its layers and its own parameters."""

    checkpoint: Checkpoint
    first: int
    end: int
    parameters: Mapping[str, Any] | None


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the output and where they come from."""

    sources: tuple[Source, ...]
    base: Checkpoint | None
    parameters: Mapping[str, Any] | None
    line: int | None
