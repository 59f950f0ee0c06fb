"""The search for the edit that its user's own scores prefer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
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


Scoring = Callable[[Candidate], Mapping[str, float]]


def search(
    study: Study,
    space: Space,
    recipe: Mapping[str, Any],
    always: Sequence[Candidate],
    trials: int,
    evaluate: Scoring,
    progress: Callable[[str], None],
) -> None:
    """Score what is always tried, then what the study proposes, leaving out what it knows.

    Args:
        study: keeps the trials.
        space: what is searched.
        recipe: that the space's values go into.
        always: plain alternatives; they do not count as trials.
        trials: how many proposals to try, those of an earlier run among them.
        evaluate: scores a candidate.
        progress: is told of each trial.
    """
    known = {trial.name for trial in study.trials if not trial.searched}
    for candidate in always:
        if candidate.name not in known:
            trial = _scored(candidate, evaluate)
            study.add(trial, candidate.values)
            progress(f"{trial.name}: {in_words(trial.scores)}")
    while (done := sum(trial.searched for trial in study.trials)) < trials:
        proposal = study.propose()
        made = space.apply(dict(recipe), proposal.values)
        values = proposal.values
        factor = space.factor(values)
        name = described(values) if factor is None else f"Wise-FT {factor:.3g}"
        candidate = Candidate(name, values, made, factor, values)
        trial = _scored(candidate, evaluate, searched=True)
        study.tell(proposal, trial)
        progress(f"trial {done + 1} of {trials}, {trial.name}: {in_words(trial.scores)}")


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


def _scored(candidate: Candidate, evaluate: Scoring, searched: bool = False) -> Trial:
    started = time.monotonic()
    scores = evaluate(candidate)
    seconds = round(time.monotonic() - started, 3)
    return Trial(
        candidate.name,
        dict(candidate.parameters),
        dict(candidate.recipe),
        dict(scores),
        seconds,
        candidate.plain,
        searched,
    )
