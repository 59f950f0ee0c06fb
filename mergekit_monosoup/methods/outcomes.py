"""What became of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mergekit_monosoup.report.schema import Action
from mergekit_monosoup.spectral.record import EditRecord


@dataclass(frozen=True)
class Outcome:
    """What was done with one tensor, and why; `edit` is there for edited ones."""

    tensor: str
    action: Action | Literal["left out"]
    reason: str = ""
    edit: EditRecord | None = None


@dataclass(frozen=True)
class MergedWeight:
    """The weight that a method has made of a group, what it has done, and why.

    `edit` is there for edited ones; `update_norm`, ||dW||_F before any edit, where it was found anyway;
    `survival`, the share of what was changed that its rounded copy holds, where `edit` does not say it.
    """

    weight: Tensor
    action: Action
    reason: str = ""
    edit: EditRecord | None = None
    update_norm: float | None = None
    survival: float | None = None


def below(threshold: float) -> str:
    """Return the reason for leaving an update as it is that `min_relative_update` gives."""
    return f"relative update below {threshold:g}"
