"""The trials of a search, kept and proposed by Optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL

from mergekit_monosoup.errors import ConfigurationError, InputError
from mergekit_monosoup.search.scores import Score
from mergekit_monosoup.search.space import Range, Space, Values

NAME = "tune"
_SETTINGS = "settings"
_TRIAL = "trial"
# A new generator a trial: what comes after an interruption is what would have come without it.
_SEEDS = 1_000_003


@dataclass(frozen=True)
class Trial:
    """A candidate that was scored.

    Args:
        name: what it is, in words.
        parameters: those that make it.
        recipe: makes it again.
        scores: by name.
        seconds: that it took, with all evaluations.
        plain: its factor where it is Wise-FT, 0 for the base and 1 for the fine-tuned checkpoint.
        searched: whether the search proposed it.
    """

    name: str
    parameters: Mapping[str, Any]
    recipe: Mapping[str, Any]
    scores: Mapping[str, float]
    seconds: float
    plain: float | None = None
    searched: bool = False


@dataclass(frozen=True)
class Proposal:
    """Values to try next; `number` is Optuna's."""

    number: int
    values: Values


class Study:
    """A search's trials; in a SQLite file, they outlive the process."""

    def __init__(
        self,
        file: Path | None,
        scores: Sequence[Score],
        space: Space,
        seed: int,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Open or begin a study.

        Args:
            file: SQLite; absent: in memory.
            scores: the objectives, in order.
            space: what is searched.
            seed: of the proposals.
            settings: what the trials depend on, by its name in messages.

        Raises:
            ConfigurationError: the file holds a search with other settings.
            InputError: it cannot be read.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._seed, self._scores = space, seed, scores
        self._distributions = {name: _distribution(range_) for name, range_ in space.ranges.items()}
        kinds = optuna.study.StudyDirection
        directions = [kinds.MINIMIZE if score.lower_is_better else kinds.MAXIMIZE for score in scores]
        url = None if file is None else URL.create("sqlite", database=str(file)).render_as_string()
        try:
            if url is not None and NAME in optuna.study.get_all_study_names(url):
                self._study = optuna.load_study(study_name=NAME, storage=url)
            else:
                self._study = optuna.create_study(study_name=NAME, storage=url, directions=directions)
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("optuna", "sqlalchemy", "alembic"):
                raise
            raise InputError(f"{file} is not a search that can be read; pass --restart ({error})") from error
        self._settle(file, dict(settings or {}))

    def _settle(self, file: Path | None, settings: dict[str, str]) -> None:
        known = self._study.user_attrs.get(_SETTINGS)
        if known is None:
            self._study.set_user_attr(_SETTINGS, settings)
            return
        changed = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
        if changed:
            raise ConfigurationError(
                f"{file} holds a search with another {', another '.join(changed)}; pass what it began with, "
                "or --restart to begin again"
            )

    @property
    def trials(self) -> list[Trial]:
        """All finished trials, in the order in which they were."""
        done = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        return [self._read(trial) for trial in done if _TRIAL in trial.user_attrs]

    def add(self, trial: Trial, values: Values | None) -> None:
        """Add a trial that was not proposed; `values` says where in the space it lies, if it does."""
        inside = values or {}
        self._study.add_trial(
            optuna.create_trial(
                values=self._values(trial),
                params=inside,
                distributions={name: self._distributions[name] for name in inside},
                user_attrs={_TRIAL: _stored(trial)},
            )
        )

    def propose(self, most: int = 1) -> list[Proposal]:
        """Return values to try next: first those that were proposed before, where nobody has scored them.

        The generator of each is seeded by its place in the search, so what is proposed depends on the scores
        so far and on how many are proposed at a time, and on nothing else.
        """
        found = []
        for left in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if left.params.keys() == self._distributions.keys():
                found.append(Proposal(left.number, dict(left.params)))
            else:
                # Killed between two of its values.
                self._study.tell(left.number, state=TrialState.FAIL)
        done = sum(trial.searched for trial in self.trials)
        while len(found) < most:
            found.append(self._asked(done + len(found)))
        return found[:most]

    def _asked(self, count: int) -> Proposal:
        self._study.sampler = optuna.samplers.TPESampler(
            seed=(self._seed * _SEEDS + count) % 2**32,
            multivariate=False,
            n_startup_trials=10,
            constant_liar=True,
        )
        if count < len(self._space.first):
            self._study.enqueue_trial(self._space.first[count], skip_if_exists=True)
        asked = self._study.ask(self._distributions)
        return Proposal(asked.number, dict(asked.params))

    def tell(self, proposal: Proposal, trial: Trial) -> None:
        """Take note of what a proposal scored."""
        running = self._study.get_trials(deepcopy=False)[proposal.number]
        optuna.trial.Trial(self._study, running._trial_id).set_user_attr(_TRIAL, _stored(trial))
        self._study.tell(proposal.number, self._values(trial))

    def _values(self, trial: Trial) -> list[float]:
        return [trial.scores[score.name] for score in self._scores]

    def _read(self, trial: FrozenTrial) -> Trial:
        known = json.loads(trial.user_attrs[_TRIAL])
        scores = {s.name: v for s, v in zip(self._scores, trial.values, strict=True)}
        return Trial(**{**known, "scores": scores})


def _stored(trial: Trial) -> str:
    return json.dumps({key: value for key, value in vars(trial).items() if key != "scores"})


def _distribution(entry: Range) -> BaseDistribution:
    if entry.choices:
        return CategoricalDistribution(entry.choices)
    if entry.integer:
        return IntDistribution(int(entry.low), int(entry.high), log=entry.log)
    return FloatDistribution(entry.low, entry.high, log=entry.log)
