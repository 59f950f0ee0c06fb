"""Sentences that follow from the numbers: how far each track goes the way that the paper reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.robustness.markdown import Scale
from benchmarks.robustness.summary import (
    Result,
    above_wise_ft,
    gains,
    id_of,
    labels,
    lora_recipes,
    ood_of,
)

# A direction agrees if the mean and at least this share of the cases have it.
_MOST = 0.75


@dataclass(frozen=True)
class Finding:
    """One hypothesis on one track: the verdict and the numbers behind it."""

    hypothesis: str
    verdict: str
    sentence: str


def verdict(values: Sequence[float]) -> str:
    """Return agrees, does not agree, or mixed, for gains that should be positive.

    agrees: mean > 0 and at least three quarters of the values > 0. does not agree: mean <= 0 and at most a
    quarter of them > 0. Otherwise mixed.
    """
    share, mean = sum(value > 0 for value in values) / len(values), fmean(values)
    if mean > 0 and share >= _MOST:
        return "agrees"
    if mean <= 0 and share <= 1 - _MOST:
        return "does not agree"
    return "mixed"


def findings(result: Result) -> list[Finding]:
    """Return the hypotheses of DESIGN.md in their order, as far as the rows allow."""
    made = [_premise(result), _robust(result), _cheap(result), _dominant(result)]
    made += [_against(result, "the other data-free methods", _rivals(result))]
    made += [_against(result, "every ablation", labels(result, ("ablation",)))]
    made += [_average(result), _adapters(result)]
    return [finding for finding in made if finding is not None]


def _premise(result: Result) -> Finding:
    pairs = gains(result, "fine-tuned", "base")
    better, worse = [first for first, _ in pairs], [-second for _, second in pairs]
    sentence = (
        f"Fine-tuning improves ID in {_count(better)} checkpoints (mean {_mean(result, better)}) and worsens "
        f"mean OOD in {_count(worse)} (mean {_mean(result, [-value for value in worse])})."
    )
    both = [min(first, second) for first, second in zip(better, worse, strict=True)]
    return Finding("premise: fine-tuning gains ID and costs OOD", verdict(both), sentence)


def _robust(result: Result) -> Finding:
    ood = [second for _, second in gains(result, "MonoSoup", "fine-tuned")]
    other = [second for _, second in gains(result, "MonoSoup R=0.8", "fine-tuned")]
    sentence = (
        f"MonoSoup improves mean OOD over the fine-tuned checkpoint in {_count(ood)} checkpoints "
        f"(mean {_mean(result, ood)}); with R = 0.8 in {_count(other)} (mean {_mean(result, other)})."
    )
    return Finding("MonoSoup raises mean OOD", verdict(ood), sentence)


def _cheap(result: Result) -> Finding:
    pairs = gains(result, "MonoSoup", "fine-tuned")
    ids, both = [first for first, _ in pairs], [first + second for first, second in pairs]
    sentence = (
        f"ID changes by {_mean(result, ids)} on average and improves in {_count(ids)}; mean OOD gains more "
        f"than ID loses in {_count(both)} (mean of the two changes' sum {_mean(result, both)})."
    )
    return Finding("MonoSoup costs less ID than it gains OOD", verdict(both), sentence)


def _dominant(result: Result) -> Finding | None:
    found = above_wise_ft(result)
    if not found:
        return None
    sentence = (
        f"At equal ID, MonoSoup → Wise-FT has the better mean OOD in {_count(found)} comparable points "
        f"(mean difference {_mean(result, found)})."
    )
    return Finding("MonoSoup → Wise-FT lies above Wise-FT at equal ID", verdict(found), sentence)


def _rivals(result: Result) -> list[str]:
    return ["Wise-FT α=0.5", *labels(result, ("lines",))]


def _against(result: Result, what: str, others: Sequence[str]) -> Finding:
    """Compare the mean of ID and mean OOD; the verdict is on the hardest of the others."""
    sums = {
        other: [(first + second) / 2 for first, second in gains(result, "MonoSoup", other)]
        for other in others
    }
    parts = [f"{other} in {_count(values)} ({_mean(result, values)})" for other, values in sums.items()]
    hardest = min(sums.values(), key=fmean)
    sentence = f"By the mean of ID and mean OOD, MonoSoup is better than {'; '.join(parts)}."
    return Finding(f"MonoSoup balances ID and OOD better than {what}", verdict(hardest), sentence)


def _average(result: Result) -> Finding | None:
    own, plain = (
        [_soup(result, pool, method) for pool in result["pools"]]
        for method in ("MonoSoup of the average", "uniform soup")
    )
    if not own:
        return None
    ood = [mine[1] - other[1] for mine, other in zip(own, plain, strict=True)]
    ids = [mine[0] - other[0] for mine, other in zip(own, plain, strict=True)]
    sentence = (
        f"MonoSoup of the average has the better mean OOD than the uniform soup in {_count(ood)} pools "
        f"(mean {_mean(result, ood)}; ID {_mean(result, ids)})."
    )
    return Finding("MonoSoup of an average raises its mean OOD", verdict(ood), sentence)


def _adapters(result: Result) -> Finding | None:
    recipes = lora_recipes(result)
    if not recipes:
        return None
    merged, exact = (
        gains(result, method, "fine-tuned", recipes) for method in ("MonoSoup", "MonoSoup, exact LoRA")
    )
    ids, ood = [first for first, _ in merged], [second for _, second in merged]
    sentence = (
        f"On LoRA fine-tunes, MonoSoup of the merged weights changes ID by {_mean(result, ids)} "
        f"and mean OOD by {_mean(result, ood)}, better in {_count(ood)}; from the factors, ID by "
        f"{_mean(result, [a for a, _ in exact])} and mean OOD by {_mean(result, [b for _, b in exact])}."
    )
    return Finding("MonoSoup raises mean OOD of LoRA fine-tunes", verdict(ood), sentence)


def _soup(result: Result, pool: Result, method: str) -> tuple[float, float]:
    (scores,) = (row["scores"] for row in pool["rows"] if row["method"] == method)
    sign = 1 if result["higher_is_better"] else -1
    return sign * id_of(result, scores), sign * ood_of(result, scores)


def _count(values: Sequence[float]) -> str:
    return f"{sum(value > 0 for value in values)} of {len(values)}"


def _mean(result: Result, values: Sequence[float]) -> str:
    """Return the mean of gains in the measure's own direction."""
    sign = 1 if result["higher_is_better"] else -1
    return f"{Scale(result).change(sign * fmean(values))} {Scale(result).points}"
