"""Does a checkpoint descend from the one that is called its base? Answered from sampled values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# Fine-tuning, even long continued pre-training, leaves cos(W0, W1) well above this; the weights of two
# separate trainings have a cosine near 0.
_RELATED = 0.5


@dataclass(frozen=True)
class Relation:
    """How one fine-tuned tensor lies to its base.

    `relative_update` is ||dW|| / ||W0||, `update_cosine` cos(dW, W0), `weight_cosine` cos(W0, W1).
    """

    tensor: str
    relative_update: float
    update_cosine: float
    weight_cosine: float


def relation(
    tensor: str, base: float, finetuned: float, update: float, update_base: float
) -> Relation | None:
    """Return the relation that follows from norms and one inner product; None where a tensor is zero.

    Args:
        tensor: its name.
        base, finetuned, update: ||W0||, ||W1||, ||dW||.
        update_base: <dW, W0>.
    """
    if not (base > 0 and finetuned > 0 and math.isfinite(base + finetuned + update)):
        return None
    cosine = update_base / (update * base) if update else 0.0
    return Relation(tensor, update / base, cosine, (base * base + update_base) / (base * finetuned))


def unrelated(base: str, finetuned: str, relations: Sequence[Relation]) -> str | None:
    """Return the message for a base that cannot be one, None where nothing speaks against it.

    Unrelated weights give ||dW|| / ||W0|| near sqrt(2) and cos(dW, W0) near -1/sqrt(2): the update
    takes the base away and puts something else in its place.
    """
    if not relations or median(r.weight_cosine for r in relations) >= _RELATED:
        return None
    size = median(r.relative_update for r in relations)
    cosine = median(r.update_cosine for r in relations)
    return (
        f"base_model {base} may not be the base of {finetuned}: in {len(relations)} sampled tensors the "
        f"update is {size:.2f} times as large as the base and its cosine to the base is {cosine:.2f} "
        "(medians), as between unrelated weights; name the checkpoint that the fine-tuning started from"
    )
