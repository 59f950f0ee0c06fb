"""Which of the scored candidates are worth having, and which one is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from mergekit_monosoup.errors import InputError

# A demand of 0 is met by what prints the same number.
_ROUNDING = 1e-12

Rule = Literal["nearest", "sum"]
Point = tuple[float, ...]


def front(points: Sequence[Point]) -> list[bool]:
    """Say for each point whether it is on the Pareto front: no other is as good in all and better in one.

    Args:
        points: of one length; more is better in each coordinate. Of equal points all are on it, or none.
    """
    return [
        not any(q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in points) for p in points
    ]


def choose(
    points: Sequence[Point], base: Point, finetuned: Point, keep: Mapping[int, float], rule: Rule = "nearest"
) -> int:
    """Return the index of the point to take.

    Of the points of the front that meet all demands, the one nearest to the best of each coordinate, in
    units of |base - fine-tuned|, or that of the largest sum; with demands, only coordinates without one
    count. The first of equals.

    Args:
        points: more is better in each coordinate.
        base, finetuned: what the scores were before.
        keep: by coordinate, what must at least be gained over the fine-tuned checkpoint.
        rule: `nearest`, or `sum` for coordinates of one unit.

    Raises:
        InputError: no point meets the demands.
    """
    allowed = [
        i
        for i, p in enumerate(points)
        if all(p[j] - finetuned[j] >= least - _ROUNDING for j, least in keep.items())
    ]
    if not allowed:
        best = {j: max(p[j] - finetuned[j] for p in points) for j in keep}
        raise InputError(f"no trial meets --keep; by themselves they reach at most {list(best.values())}")
    judged = [j for j in range(len(finetuned)) if j not in keep] or list(range(len(finetuned)))
    left = [points[i] for i in allowed]
    best_of = {j: max(p[j] for p in left) for j in judged}
    unit = {j: abs(base[j] - finetuned[j]) or best_of[j] - min(p[j] for p in left) or 1.0 for j in judged}
    on_front = front([tuple(p[j] for j in judged) for p in left])
    distances = {
        i: -sum(p[j] for j in judged) if rule == "sum" else _distance(p, best_of, unit)
        for i, p, good in zip(allowed, left, on_front, strict=True)
        if good
    }
    return min(distances, key=lambda i: (distances[i], i))


def _distance(point: Point, best: Mapping[int, float], unit: Mapping[int, float]) -> float:
    return math.hypot(*((best[j] - point[j]) / unit[j] for j in best))
