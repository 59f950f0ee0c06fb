"""Numbers that tables, cards and plots derive from records."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mergekit_monosoup.report.schema import TensorRecord

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor lies: its block, and the module's name inside the block."""

    layer: int | None
    module: str


def place(tensor: str) -> Place:
    """Read a tensor's place off its name: model.layers.3.mlp.up_proj.weight is up_proj of layer 3."""
    match = _LAYER.search(f".{tensor}")
    parts = [part for part in tensor.split(".") if part not in ("weight", "model") and not part.isdigit()]
    return Place(int(match[1]) if match else None, parts[-1] if parts else tensor)


def change(record: TensorRecord) -> float | None:
    """Return how much of the update an edit takes away, ||dW - dW_edited||_F / ||dW||_F.

    = sqrt((1 - lambda_high)^2 P_k + (1 - lambda_low)^2 (1 - P_k)), without the factor alpha.
    """
    if record.lambda_high is None or record.lambda_low is None or record.cos_alpha is None:
        return None
    low = record.cos_alpha**2
    return math.sqrt((1 - record.lambda_high) ** 2 * (1 - low) + (1 - record.lambda_low) ** 2 * low)


def by_change(records: Iterable[TensorRecord]) -> list[tuple[float, TensorRecord]]:
    """Return the edited tensors with their change, the strongest edit first."""
    changes = [(value, r) for r in records if r.action == "edited" and (value := change(r)) is not None]
    return sorted(changes, key=lambda pair: (-pair[0], pair[1].tensor))
