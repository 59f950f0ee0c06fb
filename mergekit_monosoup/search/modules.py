"""Tune modules of any library in memory, by functions."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from mergekit_monosoup.errors import InputError, ParameterError
from mergekit_monosoup.planning.settings import value_for
from mergekit_monosoup.search.choice import Rule
from mergekit_monosoup.search.scores import ALL, Score, check_names, parse_keep
from mergekit_monosoup.search.space import By, default_space
from mergekit_monosoup.search.study import Study, Trial
from mergekit_monosoup.search.tuning import GRID, Candidate, Outcome, conclude, one_by_one, search
from mergekit_monosoup.spectral.parts import Parts
from mergekit_monosoup.state_dicts import edit_state_dict

Module = TypeVar("Module", bound=nn.Module)
Scores = Mapping[str, Callable[[Any], float]]

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class TunedModule(Generic[Module]):
    """The chosen module, the parameters of the method that make it, and all trials.

    `parameters` are None where the base or the fine-tuned module itself was chosen. `holdout` has the scores
    on what the search has not seen, by the names of the trials.
    """

    module: Module
    parameters: Mapping[str, Any] | None
    outcome: Outcome
    holdout: Mapping[str, Mapping[str, float]]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, in order."""
        return self.outcome.trials


class _PartsInMemory:
    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Parts] = {}

    def parts(self, tensor: str, rule: str, find: Callable[[], Parts]) -> Parts:
        if (tensor, rule) not in self._held:
            self._held[tensor, rule] = find()
        return self._held[tensor, rule]


def tune(
    base: Mapping[str, Tensor] | nn.Module,
    finetuned: Module,
    scores: Scores,
    *,
    lower_is_better: Sequence[str] | bool = (),
    trials: int = 20,
    seed: int = 0,
    keep: Sequence[str] = (),
    choose: Rule = "nearest",
    holdout: Scores | None = None,
    method: str = "monosoup",
    by: By | None = None,
    study: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> TunedModule[Module]:
    """Search the edit of a fine-tuned module that functions score best; see the command `tune`.

    The functions are called with one copy of the module, whose weights are exchanged in place. Each update is
    split once a rule; its parts are held in memory, in float32, a copy of the matrices a rule.

    Args:
        base: the weights that the fine-tuning started from.
        finetuned: the fine-tuned module; stays as it is.
        scores: functions of the module, by name.
        lower_is_better: names of scores of which less is better, or whether that is so of all.
        trials: edits to try, beside base, fine-tuned module and a Wise-FT grid.
        seed: of the search.
        keep: demands such as "id>=-0.01", relative to the fine-tuned module.
        choose: rule among the trials of the front.
        holdout: functions that are called at the end alone.
        method: `monosoup` or `dg_hard`.
        by: `depth`, `module` or `layer-group`, which the strength then depends on.
        study: SQLite file to keep the trials in and to go on from, for the same weights and functions.
        progress: is told of each trial.
        **options: of `edit_state_dict`: `strict`, `device`, or further parameters of the method.

    Raises:
        InputError: a score is not finite, or no trial meets the demands.
        ParameterError: a name is not that of a score.
    """
    if not scores:
        raise ParameterError("tune needs a score; pass scores={'name': function}")
    given = [ALL] if lower_is_better is True else list(lower_is_better or ())
    lower = set(given)
    asked = tuple(Score(name, None, name in lower or ALL in lower) for name in scores)
    check_names(given, (*asked, *(Score(name) for name in holdout or {})), "lower_is_better:")
    demands = parse_keep(keep, asked)
    if by == "fisher":
        raise ParameterError("by='fisher' is for checkpoints of language models, by the command tune")
    original = finetuned.state_dict()
    names = list(original)
    recipe = {"merge_method": method, "parameters": {}}
    space = default_space(recipe, by, names)
    module, parts = copy.deepcopy(finetuned), _PartsInMemory()
    start = base.state_dict() if isinstance(base, nn.Module) else base

    def weights(candidate: Mapping[str, Any]) -> Mapping[str, Tensor]:
        kind = candidate["merge_method"]
        if kind in _ENDS:
            return start if kind == "base" else original
        settings = {
            name: _of_names(value, names) if isinstance(value, list) else value
            for name, value in candidate["parameters"].items()
        }
        return edit_state_dict(start, original, method=kind, parts=parts, **{**options, **settings}).weights

    def measure(functions: Scores, candidate: Mapping[str, Any]) -> dict[str, float]:
        module.load_state_dict(weights(candidate), strict=options.get("strict", True))
        found = {name: float(function(module)) for name, function in functions.items()}
        wrong = [name for name, value in found.items() if not math.isfinite(value)]
        if wrong:
            raise InputError(f"score {wrong[0]} is {found[wrong[0]]}; it must be a finite number")
        return found

    known = Study(None if study is None else Path(study), asked, space, seed, {"seed": str(seed)})
    always = [Candidate(name, {}, {"merge_method": name}, plain) for name, plain in _ENDS.items()]
    for factor in GRID:
        values = space.plain(factor) if space.plain is not None else {}
        made = space.apply(recipe, values)
        always.append(Candidate(f"Wise-FT {factor:g}", {"wise_ft": factor}, made, factor, values))
    score = one_by_one(lambda candidate: measure(scores, candidate.recipe))
    search(known, space, recipe, always, trials, score, progress)
    outcome = conclude(known, asked, demands, choose)
    compared = (outcome.base, outcome.finetuned, outcome.wise_ft, outcome.chosen) if holdout else ()
    held = {
        outcome.trials[i].name: measure(holdout or {}, outcome.trials[i].recipe)
        for i in dict.fromkeys(compared)
    }
    best = outcome.best.recipe
    module.load_state_dict(weights(best), strict=options.get("strict", True))
    return TunedModule(module, best.get("parameters"), outcome, held)


# Their "methods": nothing is merged. The factors are those of Wise-FT.
_ENDS = {"base": 0.0, "fine-tuned": 1.0}


def _of_names(setting: Any, names: Sequence[str]) -> Callable[[str], Any]:
    """Return what a gradient or a list of filters is for each tensor, as mergekit reads it in a recipe."""
    numbers = [int(match.group(1)) for name in names if (match := _NUMBER.search(name))]
    last = max(numbers, default=0)
    first = next((i for i, name in enumerate(names) if _NUMBER.search(name)), len(names))
    before = set(names[:first])

    def value(name: str) -> Any:
        match = _NUMBER.search(name)
        position = int(match.group(1)) / last if match and last else float(name not in before)
        return value_for(setting, name, position)

    return value
