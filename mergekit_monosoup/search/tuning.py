"""The search for the edit that its user's own scores prefer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_monosoup.errors import InputError
from mergekit_monosoup.search.choice import Rule, choose, front
from mergekit_monosoup.search.scores import Keep, Score, as_gains
from mergekit_monosoup.search.space import Space, Values
from mergekit_monosoup.search.study import Study, Trial

#: Factors of the fine-tuned update in the Wise-FT grid that is always tried (arXiv 2109.01903).
GRID = (0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Candidate:
    """What is to be scored: a name, the parameters to show, and the recipe that makes it.

    `plain` and `values` are those of a trial: its Wise-FT factor, and its place in the space.
    """

    name: str
    parameters: Mapping[str, Any]
    recipe: Mapping[str, Any]
    plain: float | None = None
    values: Values | None = None


@dataclass(frozen=True)
class Outcome:
    """All trials, which of them are on the front, and the one that was chosen.

    `wise_ft` is the one that would have been chosen of base, fine-tuned checkpoint and Wise-FT alone.
    """

    trials: tuple[Trial, ...]
    on_front: tuple[bool, ...]
    chosen: int
    base: int
    finetuned: int
    wise_ft: int

    @property
    def best(self) -> Trial:
        """The chosen trial."""
        return self.trials[self.chosen]


@dataclass(frozen=True)
class Scored:
    """The scores of a candidate, and the seconds that they took."""

    scores: Mapping[str, float]
    seconds: float


# Scores candidates and yields what comes of each, in their order.
Scoring = Callable[[Sequence[Candidate]], Iterable[Scored]]


def one_by_one(score: Callable[[Candidate], Mapping[str, float]]) -> Scoring:
    """Return what scores candidates one after the other in this process."""

    def scored(candidates: Sequence[Candidate]) -> Iterator[Scored]:
        for candidate in candidates:
            started = time.monotonic()
            scores = score(candidate)
            yield Scored(scores, round(time.monotonic() - started, 3))

    return scored


def search(
    study: Study,
    space: Space,
    recipe: Mapping[str, Any],
    always: Sequence[Candidate],
    trials: int,
    evaluate: Scoring,
    progress: Callable[[str], None],
    at_once: int = 1,
) -> None:
    """Score what is always tried, then what the study proposes, leaving out what it knows.

    Args:
        study: keeps the trials.
        space: what is searched.
        recipe: that the space's values go into.
        always: plain alternatives; they do not count as trials.
        trials: how many proposals to try, those of an earlier run among them.
        evaluate: scores candidates.
        progress: is told of each trial.
        at_once: proposals that are scored at a time; each is made without the scores of the others.
    """
    known = {trial.name for trial in study.trials if not trial.searched}
    rest = [candidate for candidate in always if candidate.name not in known]
    for candidate, scored in zip(rest, evaluate(rest), strict=True):
        trial = _trial(candidate, scored)
        study.add(trial, candidate.values)
        progress(f"{trial.name}: {in_words(trial.scores)}")
    while (done := sum(trial.searched for trial in study.trials)) < trials:
        proposals = study.propose(min(at_once, trials - done))
        proposed = [_proposed(space, recipe, proposal.values) for proposal in proposals]
        for proposal, candidate, scored in zip(proposals, proposed, evaluate(proposed), strict=True):
            trial = _trial(candidate, scored, searched=True)
            study.tell(proposal, trial)
            done += 1
            progress(f"trial {done} of {trials}, {trial.name}: {in_words(trial.scores)}")


def conclude(study: Study, scores: Sequence[Score], keep: Sequence[Keep], rule: Rule) -> Outcome:
    """Choose among the trials of a study; see `choice.choose`.

    Raises:
        InputError: none meets the demands.
    """
    trials = study.trials
    points = [as_gains(trial.scores, scores) for trial in trials]
    base, finetuned = (
        next(i for i, trial in enumerate(trials) if trial.plain == factor and not trial.searched)
        for factor in (0, 1)
    )
    names = [score.name for score in scores]
    demands = {names.index(demand.name): demand.least for demand in keep}
    ends = points[base], points[finetuned]
    chosen = choose(points, *ends, demands, rule)
    plain = [i for i, trial in enumerate(trials) if trial.plain is not None]
    try:
        wise_ft = plain[choose([points[i] for i in plain], *ends, demands, rule)]
    except InputError:
        # Only an edit meets the demands.
        wise_ft = finetuned
    return Outcome(tuple(trials), tuple(front(points)), chosen, base, finetuned, wise_ft)


def described(values: Mapping[str, Any]) -> str:
    """Return values in a few words."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def in_words(scores: Mapping[str, float]) -> str:
    """Return scores by their names."""
    return ", ".join(f"{name} {value:g}" for name, value in scores.items())


def key_of(recipe: Mapping[str, Any]) -> str:
    """Return a text that is the same for the same recipe."""
    return json.dumps(recipe, sort_keys=True)


def _proposed(space: Space, recipe: Mapping[str, Any], values: Values) -> Candidate:
    factor = space.factor(values)
    name = described(values) if factor is None else f"Wise-FT {factor:.3g}"
    return Candidate(name, values, space.apply(dict(recipe), values), factor, values)


def _trial(candidate: Candidate, scored: Scored, searched: bool = False) -> Trial:
    return Trial(
        candidate.name,
        dict(candidate.parameters),
        dict(candidate.recipe),
        dict(scored.scores),
        scored.seconds,
        candidate.plain,
        searched,
    )
