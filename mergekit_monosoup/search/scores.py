"""The scores that a search goes by, and what their user asks of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.search.evaluation import Evaluation
from mergekit_monosoup.search.functions import PREFIX as FUNCTION
from mergekit_monosoup.search.functions import FunctionEvaluation, InMemory
from mergekit_monosoup.search.lm_evaluation import PREFIX as LM_EVAL
from mergekit_monosoup.search.lm_evaluation import LmEvaluation

ALL = "all"
_NAME = re.compile(r"[A-Za-z][\w.-]*")
_KEEP = re.compile(r"\s*([A-Za-z][\w.-]*)\s*>=\s*(\S+)\s*")


@dataclass(frozen=True)
class Score:
    """A named score, whether less is better, and what says it: a command or a function by its name.

    Without either, it is said by a function in hand.
    """

    name: str
    evaluation: Evaluation | InMemory | None = None
    lower_is_better: bool = False

    @cached_property
    def digest(self) -> str:
        """Digest of the command and of the files that it names, as they were when it was first asked for."""
        return "" if self.evaluation is None else self.evaluation.digest()

    @property
    def sign(self) -> float:
        """Factor that turns the score into one of which more is better."""
        return -1.0 if self.lower_is_better else 1.0


@dataclass(frozen=True)
class Keep:
    """A demand on a score: no less than so much better than that of the fine-tuned checkpoint.

    `least` is in the score's own direction: -0.01 allows a loss of 0.01, whichever way is better.
    """

    name: str
    least: float

    def __str__(self) -> str:
        return f"{self.name}>={self.least:g}"


def parse_scores(
    given: Sequence[str],
    lower_is_better: Iterable[str] = (),
    option: str = "--score",
    per_item: Iterable[str] = (),
) -> tuple[Score, ...]:
    """Return the scores of options `NAME=COMMAND`.

    Args:
        given: the options' values.
        lower_is_better: names of scores of which less is better; `all` for all of them.
        option: for messages.
        per_item: names of scores that are the mean of those of items; `all` for all of them.

    Raises:
        ParameterError: an option is of another form, or a name is given twice or not at all.
    """
    lower, items = set(lower_is_better), set(per_item)
    commands: dict[str, str] = {}
    for text in given:
        name, equals, command = text.partition("=")
        name = name.strip()
        if not equals or not _NAME.fullmatch(name) or not command.strip():
            raise ParameterError(
                f"{option} {text!r} is not of the form NAME=COMMAND, as in id='python id.py {{model}}'"
            )
        if name in commands:
            raise ParameterError(f"{option} {name} is given twice; give each score a name of its own")
        commands[name] = command
    result = []
    for name, command in commands.items():
        evaluation = evaluation_of(command, f"{option} {name}=", bool({name, ALL} & items))
        own = evaluation.lower_is_better if isinstance(evaluation, InMemory) else None
        result.append(Score(name, evaluation, bool({name, ALL} & lower) if own is None else own))
    return tuple(result)


def of_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return tasks of lm_eval, several with commas between them, as options `NAME=lm-eval:TASK`."""
    names = [task.strip() for text in tasks for task in text.split(",") if task.strip()]
    return tuple(f"{PurePath(name.partition('?')[0]).stem}={LM_EVAL}{name}" for name in names)


def evaluation_of(text: str, option: str, per_item: bool = False) -> Evaluation | InMemory:
    """Return what a score's option names: a command, a function of a loaded model, or a task of lm_eval.

    Raises:
        ParameterError: it is of neither form.
    """
    if text.startswith(FUNCTION):
        return FunctionEvaluation(text, option, per_item)
    if text.startswith(LM_EVAL):
        return LmEvaluation(text, option, per_item)
    return Evaluation(text, option, per_item)


def check_names(names: Iterable[str], scores: Sequence[Score], option: str) -> None:
    """Refuse names that no score has.

    Raises:
        ParameterError: names the scores there are.
    """
    known = [score.name for score in scores]
    for name in names:
        if name not in (*known, ALL):
            raise ParameterError(
                f"{option} {name!r} is not the name of a score; there are {', '.join(known)}"
            )


def parse_keep(given: Sequence[str], scores: Sequence[Score]) -> tuple[Keep, ...]:
    """Return the demands of options `NAME>=CHANGE`.

    Raises:
        ParameterError: an option is of another form, or names no score.
    """
    demands = []
    for text in given:
        match = _KEEP.fullmatch(text)
        try:
            least = float(match.group(2)) if match else None
        except ValueError:
            least = None
        if match is None or least is None or least != least:
            raise ParameterError(f"--keep {text!r} is not of the form NAME>=CHANGE, as in 'id>=-0.01'")
        demands.append(Keep(match.group(1), least))
    check_names((keep.name for keep in demands), scores, "--keep")
    return tuple(demands)


def as_gains(values: Mapping[str, float], scores: Sequence[Score]) -> tuple[float, ...]:
    """Return the values in the order of the scores, turned so that more is better."""
    return tuple(score.sign * values[score.name] for score in scores)
