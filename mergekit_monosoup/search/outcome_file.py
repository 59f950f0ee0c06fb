"""What a search found, for programs and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_monosoup.report.page.front import FILE_NAME
from mergekit_monosoup.report.versions import installed_version, versions
from mergekit_monosoup.search.intervals import Interval
from mergekit_monosoup.search.scores import Keep, Score
from mergekit_monosoup.search.tuning import Outcome

__all__ = ["FILE_NAME", "Held", "content", "table", "verdict", "write"]

# Scores of one trial by name, of several trials by their index.
Held = Mapping[int, Mapping[str, float]]


def content(
    outcome: Outcome,
    scores: Sequence[Score],
    keep: Sequence[Keep],
    seed: int,
    written: Mapping[str, float],
    holdout: Held,
    intervals: Sequence[Interval] = (),
) -> dict[str, Any]:
    """Return what tune.json holds.

    Args:
        outcome: of the search.
        scores, keep, seed: that it went by.
        written: what the written model scored.
        holdout: what some trials scored on what the search has not seen.
        intervals: how sure differences are, where scores are of items.
    """
    return {
        "scores": [{"name": s.name, "lower_is_better": s.lower_is_better} for s in scores],
        "keep": [str(demand) for demand in keep],
        "seed": seed,
        "versions": versions() | {"optuna": installed_version("optuna")},
        "trials": [
            {
                "name": trial.name,
                "parameters": dict(trial.parameters),
                "scores": dict(trial.scores),
                "seconds": trial.seconds,
                "on_front": good,
                "wise_ft": trial.plain,
                "searched": trial.searched,
                **({"holdout": dict(holdout[index])} if index in holdout else {}),
            }
            for index, (trial, good) in enumerate(zip(outcome.trials, outcome.on_front, strict=True))
        ],
        "chosen": outcome.chosen,
        "best_wise_ft": outcome.wise_ft,
        "written": dict(written),
        **({"intervals": [interval.content() for interval in intervals]} if intervals else {}),
    }


def write(file: Path, held: Mapping[str, Any]) -> None:
    """Write tune.json."""
    file.write_text(json.dumps(held, indent=2) + "\n", "utf-8")


def table(
    outcome: Outcome, scores: Sequence[Score], holdout: Held, intervals: Sequence[Interval] = ()
) -> str:
    """Return all trials as a table: plain alternatives, then the others by their first score."""
    names = [score.name for score in scores]
    first = scores[0]
    order = sorted(
        range(len(outcome.trials)),
        key=lambda i: (
            outcome.trials[i].searched,
            -first.sign * outcome.trials[i].scores[first.name] if outcome.trials[i].searched else i,
        ),
    )
    rows = [("trial", *names, "")]
    for index in order:
        trial = outcome.trials[index]
        marks = ["front"] if outcome.on_front[index] else []
        marks += ["CHOSEN"] if index == outcome.chosen else []
        rows.append((trial.name, *(f"{trial.scores[n]:.6g}" for n in names), ", ".join(marks)))
    lines = _aligned(rows)
    if holdout:
        held = list(next(iter(holdout.values())))
        also = [("on what the search has not seen", *held)]
        also += [
            (outcome.trials[i].name, *(f"{values[n]:.6g}" for n in held)) for i, values in holdout.items()
        ]
        lines += ["", *_aligned(also)]
    if intervals:
        lines += ["", "differences with 95 % intervals", *map(str, intervals)]
    return "\n".join(lines)


def verdict(outcome: Outcome) -> str:
    """Say in a sentence what was chosen, and whether it is but Wise-FT."""
    best, wise = outcome.best, outcome.trials[outcome.wise_ft]
    if best.plain is None:
        return f"chosen: {best.name}; the best without any edit is {wise.name}"
    if best.plain in (0, 1):
        return f"{best.name} wins: nothing that was tried is better by these scores"
    return f"plain Wise-FT wins: no edit that was tried is better by these scores than {best.name}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
