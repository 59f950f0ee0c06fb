"""Which threshold of SFGS keeps what greedy soup keeps, over all pools of all tracks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.robustness.markdown import Scale, table
from benchmarks.robustness.summary import Result, id_of, ood_of


def pool_agreement(pool: Result) -> list[tuple[int, int]]:
    """Return for each threshold: decisions taken as greedy soup took them, and decisions there were.

    The first candidate is in every soup and no decision.
    """
    greedy = set(pool["greedy"]["taken"])
    asked = pool["greedy"]["order"][1:]
    return [(sum((m in d["taken"]) == (m in greedy) for m in asked), len(asked)) for d in pool["sfgs"]]


def threshold_table(results: Sequence[Result]) -> list[str]:
    """Return, by threshold: agreement with greedy soup in each track and in all, kept shares, scores."""
    names = [result["track"] for result in results]
    columns = ["threshold", *(f"as greedy, {name}" for name in names), "as greedy, all", "kept"]
    columns += [f"ID / mean OOD less greedy's, {name}" for name in names]
    pools = [pool for result in results for pool in result["pools"]]
    body = []
    for index, threshold in enumerate(_thresholds(results)):
        agreed = [_sum(result, index) for result in results]
        everything = (sum(same for same, _ in agreed), sum(asked for _, asked in agreed))
        kept = sum(len(pool["sfgs"][index]["taken"]) - 1 for pool in pools)
        differences = []
        for result in results:
            scale, pairs = Scale(result), _less_greedy(result, index)
            differences.append(" / ".join(scale.change(fmean(p[axis] for p in pairs)) for axis in (0, 1)))
        shares = [f"{same} of {asked}" for same, asked in (*agreed, everything)]
        body.append([f"{threshold:g}", *shares, f"{kept} of {everything[1]}", *differences])
    kept = sum(len(pool["greedy"]["taken"]) - 1 for pool in pools)
    body.append(["greedy soup", *[""] * (len(names) + 1), f"{kept} of {everything[1]}", *[""] * len(names)])
    return table(columns, body)


def best_thresholds(results: Sequence[Result]) -> tuple[list[float], int, int]:
    """Return the thresholds that agree most with greedy soup, in how many decisions, of how many."""
    thresholds = _thresholds(results)
    agreed = [sum(_sum(result, index)[0] for result in results) for index in range(len(thresholds))]
    asked = sum(_sum(result, 0)[1] for result in results)
    best = max(agreed)
    return [t for t, same in zip(thresholds, agreed, strict=True) if same == best], best, asked


def refused(results: Sequence[Result]) -> dict[float, int]:
    """Return for each threshold how many candidates that greedy soup keeps SFGS refuses, over all pools."""
    pools = [pool for result in results for pool in result["pools"]]
    return {
        threshold: sum(
            len(set(pool["greedy"]["taken"]) - set(pool["sfgs"][index]["taken"])) for pool in pools
        )
        for index, threshold in enumerate(_thresholds(results))
    }


def _thresholds(results: Sequence[Result]) -> list[float]:
    return [decision["threshold"] for decision in results[0]["pools"][0]["sfgs"]]


def _sum(result: Result, index: int) -> tuple[int, int]:
    pairs = [pool_agreement(pool)[index] for pool in result["pools"]]
    return sum(same for same, _ in pairs), sum(asked for _, asked in pairs)


def _less_greedy(result: Result, index: int) -> list[tuple[float, float]]:
    found = []
    for pool in result["pools"]:
        (greedy,) = (row["scores"] for row in pool["rows"] if row["method"] == "greedy soup")
        mine = pool["sfgs"][index]["scores"]
        found.append(
            (id_of(result, mine) - id_of(result, greedy), ood_of(result, mine) - ood_of(result, greedy))
        )
    return found
