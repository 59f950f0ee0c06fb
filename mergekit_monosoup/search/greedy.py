"""The search itself: in which order candidates are tried, and which are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One soup that was scored: its members by index, and whether it became the soup."""

    members: tuple[int, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class GreedySoup:
    """The winning soup, its score, and all trials: first the candidates alone, best first."""

    members: tuple[int, ...]
    score: float
    trials: tuple[Trial, ...]


def greedy_soup(
    count: int, score: Callable[[Sequence[int]], float], *, lower_is_better: bool = False
) -> GreedySoup:
    """Search the greedy soup of `count` candidates (arXiv 2203.05482, recipe 1).

    Candidates are ranked by their own score, ties as they come. The best one is the first soup; each
    further one is added to the members if the plain mean of them all scores strictly better, and is
    not looked at again otherwise.

    Args:
        count: number of candidates.
        score: scores the mean of the candidates with these indices.
        lower_is_better: of the score.
    """
    sign = -1.0 if lower_is_better else 1.0
    alone = [score((index,)) for index in range(count)]
    ranking = sorted(range(count), key=lambda index: -sign * alone[index])
    members: tuple[int, ...] = (ranking[0],)
    best = alone[ranking[0]]
    trials = [Trial((index,), alone[index], index == ranking[0]) for index in ranking]
    for index in ranking[1:]:
        candidate = (*members, index)
        found = score(candidate)
        kept = sign * found > sign * best
        trials.append(Trial(candidate, found, kept))
        if kept:
            members, best = candidate, found
    return GreedySoup(members, best, tuple(trials))
