"""The trials of a search, as `tune.json` holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_monosoup.errors import InputError
from mergekit_monosoup.report.schema import Figure

FILE_NAME = "tune.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class FrontScore(_Part):
    """One of the scores that a search went by."""

    name: str
    lower_is_better: bool = False


class FrontTrial(_Part):
    """One trial: what it is called, what made it, and what it scored."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Figure]
    on_front: bool = False
    wise_ft: float | None = Field(default=None, description="0: the base, 1: the fine-tuned checkpoint")
    holdout: dict[str, Figure] = Field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Of what kind it is: Wise-FT, or the rule that splits the updates."""
        return "Wise-FT" if self.wise_ft is not None else str(self.parameters.get("split", "edit"))


class Front(_Part):
    """All trials of a search, and the chosen one's place among them."""

    scores: tuple[FrontScore, ...] = Field(min_length=1)
    trials: tuple[FrontTrial, ...] = Field(min_length=1)
    chosen: int = Field(ge=0)


def read_front(folder: Path) -> Front | None:
    """Return what `tune` has left beside a model; None where there is no such file.

    Raises:
        InputError: the file is not what `tune` writes; names it.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    try:
        front = Front.model_validate(json.loads(file.read_text("utf-8")))
    except (ValidationError, ValueError) as error:
        raise InputError(f"{file} is not what tune writes; run tune again or delete it") from error
    if front.chosen >= len(front.trials):
        raise InputError(
            f"{file} names trial {front.chosen} of {len(front.trials)}; run tune again or delete it"
        )
    return front
