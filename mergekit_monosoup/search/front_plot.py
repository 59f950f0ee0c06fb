"""The front of a search as a figure; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mergekit_monosoup.search.scores import Score
from mergekit_monosoup.search.study import Trial
from mergekit_monosoup.search.tuning import Outcome

_MARKERS = "s^vDPX<>"
_DPI = 150


def draw_front(file: Path, outcome: Outcome, scores: Sequence[Score]) -> None:
    """Draw all trials by their first two scores: Wise-FT as a curve, edits by their split, the chosen one.

    Args:
        file: PNG.
        outcome: of a search.
        scores: at least two.
    """
    first, second = scores[:2]
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()

    def points(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
        return [t.scores[first.name] for t in trials], [t.scores[second.name] for t in trials]

    plain = sorted((t for t in outcome.trials if t.plain is not None), key=lambda t: t.plain or 0.0)
    axes.plot(*points(plain), "o-", color="0.4", label="Wise-FT, base to fine-tuned", markersize=4)
    groups: dict[str, list[Trial]] = {}
    for trial in outcome.trials:
        if trial.plain is None:
            groups.setdefault(str(trial.parameters.get("split", "edit")), []).append(trial)
    for number, (name, trials) in enumerate(groups.items()):
        axes.scatter(*points(trials), marker=_MARKERS[number % len(_MARKERS)], s=36, label=name, alpha=0.8)
    on_front = [t for t, good in zip(outcome.trials, outcome.on_front, strict=True) if good]
    axes.scatter(*points(on_front), s=110, facecolors="none", edgecolors="black", label="on the front")
    axes.scatter(*points([outcome.best]), marker="*", s=220, color="tab:red", label="chosen", zorder=3)
    for index, side in ((outcome.base, "base"), (outcome.finetuned, "fine-tuned")):
        x, y = points([outcome.trials[index]])
        axes.annotate(side, (x[0], y[0]), xytext=(5, 5), textcoords="offset points", fontsize=8)
    _name(axes.set_xlabel, first)
    _name(axes.set_ylabel, second)
    # Room for the names of the ends.
    axes.margins(0.1)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=_DPI)


def _name(label: Any, score: Score) -> None:
    label(f"{score.name} ({'lower' if score.lower_is_better else 'higher'} is better)")
