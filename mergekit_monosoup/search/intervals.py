"""How sure the difference between two candidates is, from their scores of single items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from mergekit_monosoup.errors import InputError
from mergekit_monosoup.search.scores import Score
from mergekit_monosoup.search.study import Trial
from mergekit_monosoup.search.tuning import Outcome

_RESAMPLES = 2000
_LEVEL = 0.95

# The scores of a trial's items; none where they are not known.
ItemsOf = Callable[[Trial, Score], Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """What the chosen trial scores above another, and where that lies for other items of the same kind.

    `difference` is the mean over `items` items, `low` and `high` the bounds of its 95 % interval.
    """

    score: str
    against: str
    difference: float
    low: float
    high: float
    items: int

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        said = "" if self.sure else f", inside the noise of {self.items} items"
        return (
            f"{self.score}, chosen less {self.against}: {self.difference:+.4g} "
            f"[{self.low:+.4g}, {self.high:+.4g}]{said}"
        )

    def content(self) -> dict[str, Any]:
        """Return it for tune.json."""
        return {**asdict(self), "sure": self.sure}


def intervals(
    outcome: Outcome, scores: Sequence[Score], items_of: ItemsOf, seed: int = 0
) -> tuple[Interval, ...]:
    """Compare the chosen trial with base, fine-tuned checkpoint and best Wise-FT, item by item.

    The percentile bootstrap of the mean difference: items are drawn with replacement, the same for both,
    since one that is hard for one model is hard for the other (Efron & Tibshirani 1993, chapter 13).

    Args:
        outcome: of the search.
        scores: those without items are left out.
        items_of: gives the scores of a trial's items.
        seed: of the resampling.

    Raises:
        InputError: two trials were scored on different numbers of items.
    """
    found = []
    for score in scores:
        best = np.asarray(items_of(outcome.best, score), np.float64)
        for index in dict.fromkeys((outcome.base, outcome.finetuned, outcome.wise_ft)):
            other = outcome.trials[index]
            items = np.asarray(items_of(other, score), np.float64)
            if index == outcome.chosen or not len(best) or not len(items):
                continue
            if len(best) != len(items):
                raise InputError(
                    f"score {score.name} has {len(best)} items for {outcome.best.name} and {len(items)} for "
                    f"{other.name}; --per-item compares them one by one, so all must be scored on the same"
                )
            low, high = _bounds(best - items, seed)
            difference = float(np.mean(best - items))
            found.append(Interval(score.name, other.name, difference, low, high, len(items)))
    return tuple(found)


def _bounds(differences: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    result = bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=_LEVEL,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
