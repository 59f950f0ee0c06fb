"""Figures over the rows of a result file: means, spreads, differences, curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

Result = dict[str, Any]
Point = tuple[float, float]


def id_of(result: Result, scores: dict[str, float]) -> float:
    """Return the score in distribution."""
    return scores[result["in_distribution"]]


def ood_of(result: Result, scores: dict[str, float]) -> float:
    """Return the mean of the scores on the shifts."""
    return fmean(scores[shift] for shift in result["shifts"])


def full_recipes(result: Result) -> list[str]:
    """Return the names of the recipes that train all weights."""
    return [recipe["name"] for recipe in result["recipes"] if recipe["lora_rank"] is None]


def lora_recipes(result: Result) -> list[str]:
    """Return the names of the recipes that train an adapter."""
    return [recipe["name"] for recipe in result["recipes"] if recipe["lora_rank"] is not None]


def rows_of(result: Result, method: str, recipes: Sequence[str] | None = None) -> list[Result]:
    """Return the rows of a method, by recipe and seed; of the base one for each fine-tune."""
    recipes = full_recipes(result) if recipes is None else recipes
    if method == "base":
        tuned = rows_of(result, "fine-tuned", recipes)
        return [{**row, "method": "base", "scores": result["base"]["scores"]} for row in tuned]
    return [row for row in result["rows"] if row["method"] == method and row["recipe"] in recipes]


def labels(result: Result, families: Iterable[str], recipes: Sequence[str] | None = None) -> list[str]:
    """Return the methods of these families in the order of their rows."""
    recipes = full_recipes(result) if recipes is None else recipes
    wanted = set(families)
    rows = [row for row in result["rows"] if row["family"] in wanted and row["recipe"] in recipes]
    return list(dict.fromkeys(row["method"] for row in rows))


def differences(result: Result, method: str, other: str, recipes: Sequence[str] | None = None) -> list[Point]:
    """Return (ID, mean OOD) of `method` less those of `other`, for each fine-tune that has both.

    In the measure's own direction: where lower is better, a gain is negative.
    """
    against = {(row["recipe"], row["seed"]): row for row in rows_of(result, other, recipes)}
    return [
        (
            id_of(result, row["scores"]) - id_of(result, found["scores"]),
            ood_of(result, row["scores"]) - ood_of(result, found["scores"]),
        )
        for row in rows_of(result, method, recipes)
        if (found := against.get((row["recipe"], row["seed"]))) is not None
    ]


def gains(result: Result, method: str, other: str, recipes: Sequence[str] | None = None) -> list[Point]:
    """Return the same differences with positive numbers for gains."""
    sign = 1 if result["higher_is_better"] else -1
    return [(sign * first, sign * second) for first, second in differences(result, method, other, recipes)]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation; None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def curve(result: Result, recipe: str, seed: int, edited: bool) -> list[Point]:
    """Return (ID, mean OOD) from the base to the end of a Wise-FT curve, by alpha, with signs for gains.

    `edited`: of MonoSoup then Wise-FT, which ends in MonoSoup; otherwise of Wise-FT.
    """
    family, end = ("monosoup-wise-ft", "MonoSoup") if edited else ("wise-ft", "fine-tuned")
    mine = [row for row in result["rows"] if (row["recipe"], row["seed"]) == (recipe, seed)]
    inner = sorted((row for row in mine if row["family"] == family), key=lambda row: row["alpha"])
    last = [row for row in mine if row["method"] == end]
    sign = 1 if result["higher_is_better"] else -1
    scores = [result["base"]["scores"], *(row["scores"] for row in [*inner, *last])]
    return [(sign * id_of(result, s), sign * ood_of(result, s)) for s in scores]


def best_at(points: Sequence[Point], x: float) -> float | None:
    """Return the largest y that the polyline through the points takes at x; None where it has no x."""
    found = []
    for (x1, y1), (x2, y2) in pairwise(points):
        if min(x1, x2) <= x <= max(x1, x2):
            if x1 == x2:
                found.append(max(y1, y2))
            else:
                found.append(y1 + (y2 - y1) * (x - x1) / (x2 - x1))
    return max(found, default=None)


def above_wise_ft(result: Result) -> list[float]:
    """Return, for each point of MonoSoup's curves, its mean OOD less what Wise-FT has at the same ID.

    Points outside the ID that Wise-FT's curve covers cannot be compared and are left out; the common
    start, the base, too.
    """
    found = []
    for recipe in full_recipes(result):
        for seed in result["seeds"]:
            plain = curve(result, recipe, seed, edited=False)
            for x, y in curve(result, recipe, seed, edited=True)[1:]:
                reached = best_at(plain, x)
                if reached is not None:
                    found.append(y - reached)
    return found
