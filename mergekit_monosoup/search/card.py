"""What a search has found, in the card of the model that it chose."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from mergekit_monosoup.search.intervals import Interval
from mergekit_monosoup.search.outcome_file import FILE_NAME, Held, verdict
from mergekit_monosoup.search.scores import Score
from mergekit_monosoup.search.tuning import Outcome

FRONT = "tune_front.png"
_BEFORE = "### Configuration"


def describe(
    folder: Path,
    name: str,
    outcome: Outcome,
    scores: Sequence[Score],
    holdout: Held,
    intervals: Sequence[Interval] = (),
) -> None:
    """Add the table of trials, the drawn front and the scores as `model-index` to a model's card.

    Args:
        folder: of the model, with its card.
        name: of the model.
        outcome: of the search.
        scores: that it went by.
        holdout: what some trials scored on what the search has not seen.
        intervals: how sure differences are, where scores are of items.
    """
    card = ModelCard.load(folder / "README.md")
    figure = ""
    if len(scores) > 1 and importlib.util.find_spec("matplotlib") is not None:
        from mergekit_monosoup.search.front_plot import draw_front

        draw_front(folder / FRONT, outcome, scores)
        figure = f"\n![Scores of all trials]({FRONT})\n"
    sure = "".join(f"- {interval}\n" for interval in intervals)
    sure = f"\nDifferences with 95 % intervals:\n\n{sure}" if sure else ""
    section = f"{_section(outcome, scores, holdout)}{sure}{figure}\n"
    before, marker, after = card.text.partition(_BEFORE)
    card.text = f"{before}{section}{marker}{after}" if marker else f"{card.text.rstrip()}\n\n{section}"
    card.data.model_name = name
    card.data.eval_results = _results(outcome, scores, holdout, card.data.get("pipeline_tag"))
    card.save(folder / "README.md")


def _section(outcome: Outcome, scores: Sequence[Score], holdout: Held) -> str:
    names = [score.name for score in scores]
    directions = ", ".join(
        f"{s.name}: {'lower' if s.lower_is_better else 'higher'} is better" for s in scores
    )
    held = list(next(iter(holdout.values()), {}))
    heads = ["trial", *names, *(f"{name} (not seen by the search)" for name in held), "front"]
    lines = [
        "### Search",
        "",
        f"Chosen among {len(outcome.trials)} trials by {len(scores)} score{'s' * (len(scores) > 1)} "
        f"({directions}); {verdict(outcome)}. All trials are in `{FILE_NAME}`.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    shown = {outcome.base, outcome.finetuned, outcome.wise_ft, outcome.chosen}
    shown |= {index for index, good in enumerate(outcome.on_front) if good}
    for index in sorted(shown):
        trial = outcome.trials[index]
        cells = [f"{trial.scores[name]:.5g}" for name in names]
        cells += [f"{holdout[index][name]:.5g}" if index in holdout else "" for name in held]
        label = f"**{trial.name}** (chosen)" if index == outcome.chosen else trial.name
        lines.append(f"| {' | '.join([label, *cells, 'yes' * outcome.on_front[index]])} |")
    return "\n".join(lines) + "\n"


def _results(outcome: Outcome, scores: Sequence[Score], holdout: Held, task: str | None) -> list[EvalResult]:
    values = {**outcome.best.scores, **holdout.get(outcome.chosen, {})}
    return [
        EvalResult(
            task_type=task or "other",
            # By its type, not its name, results of several data are told apart.
            dataset_type=name,
            dataset_name=name,
            metric_type=name,
            metric_value=value,
            metric_name=name if name in outcome.best.scores else f"{name} (not seen by the search)",
        )
        for name, value in values.items()
    ]
