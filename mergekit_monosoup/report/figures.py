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
    """Where in the model a tensor lies: its block, and the path of the module inside the block.

    `stack` is the path of the blocks, as `encoder.block`: some models have several of them.
    """

    layer: int | None
    module: str
    stack: str = ""


def place(tensor: str) -> Place:
    """Read a tensor's place off its name: model.layers.3.mlp.up_proj.weight is mlp.up_proj of layer 3.

    Numbers behind the block's own, as those of experts, are left out.
    """
    match = _LAYER.search(f".{tensor}")
    before, inside = (
        ("", tensor) if match is None else (tensor[: max(match.start() - 1, 0)], tensor[match.end() - 1 :])
    )
    parts = [part for part in inside.split(".") if part not in ("weight", "model") and not part.isdigit()]
    return Place(int(match[1]) if match else None, ".".join(parts) or "weight", before)


def module_names(records: Iterable[TensorRecord]) -> dict[str, str]:
    """Return what the module of each tensor is called, with its stack of blocks where there are several."""
    places = {record.tensor: place(record.tensor) for record in records}
    several = len({where.stack for where in places.values() if where.layer is not None}) > 1
    return {
        name: f"{where.stack}: {where.module}" if several and where.stack else where.module
        for name, where in places.items()
    }


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
