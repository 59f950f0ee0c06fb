"""What the study asks of a track: one kind of model, its data, its ways of fine-tuning, its measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

# step, number of steps, loss of the step.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Recipe:
    """One way of fine-tuning.

    schedule: a name that transformers.get_scheduler knows. lora_rank: None trains all weights.
    """

    name: str
    learning_rate: float
    schedule: str
    steps: int
    weight_decay: float = 0.0
    lora_rank: int | None = None


class Track(Protocol):
    """One kind of model with everything that its part of the study needs.

    `scores` returns one number for each of `validation`, `in_distribution` and `shifts`, on the same
    inputs for every checkpoint. Choices may look at `validation` only.
    """

    name: str
    architecture: str
    measure: str
    higher_is_better: bool
    validation: str
    in_distribution: str
    shifts: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]

    def pretrain(self, out: Path, progress: Progress) -> None:
        """Write the base as a transformers checkpoint in float32."""

    def finetune(self, base: Path, recipe: Recipe, seed: int, out: Path, progress: Progress) -> None:
        """Write a float32 transformers checkpoint, or a PEFT adapter if the recipe has a LoRA rank."""

    def scores(self, checkpoint: Path) -> dict[str, float]:
        """Measure a checkpoint on every test set."""

    def activations(self, checkpoint: Path) -> dict[str, list[Tensor]]:
        """Return each block's output, `[samples, features]` float64, under "id" and under "ood"."""

    def data_card(self) -> dict[str, object]:
        """Return sizes, sources and SHA-256 of every split."""
