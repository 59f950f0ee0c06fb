"""RESULTS.md and the figures, from the files of results alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_models.learning import PIECES
from benchmarks.robustness.markdown import table, wrapped

RESAMPLES = 1000
Array = Any


@dataclass(frozen=True)
class Scores:
    """Bits per byte of all rows of a piece, `[rows, resamples]`; column 0 is without resampling."""

    ids: Array
    ood: Array
    validation: Array
    by_domain: dict[str, Array]


def scores(result: dict[str, Any], seed: int = 0) -> Scores:
    """Return scores with paired resamples of the windows of each domain."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, sizes in result["bytes"].items():
        taken = np.array([row["bits"][name] for row in result["rows"]])
        count = len(sizes)
        picks = np.vstack([np.arange(count), draw.integers(count, size=(RESAMPLES, count))])
        found[name] = taken[:, picks].sum(-1) / np.array(sizes)[picks].sum(-1)
    ood = np.mean([found[name] for name in result["test"]], axis=0)
    return Scores(found[result["in_distribution"]], ood, found[result["validation"]], found)


def above_curve(ids: Array, values: Array, curve: Sequence[int]) -> Array:
    """Return each row's value less that of the Wise-FT curve at the same ID, `[rows, resamples]`.

    The curve is a chain of straight lines through rows `curve`; at an ID that several of its branches have,
    the lowest counts. Not a number where the curve does not reach the ID.
    """
    result = np.full(values.shape, np.nan)
    for column in range(values.shape[1]):
        x, y = ids[curve, column], values[curve, column]
        for row in range(len(values)):
            at = ids[row, column]
            best = np.nan
            for i in range(len(curve) - 1):
                low, high = sorted((x[i], x[i + 1]))
                if low <= at <= high and high > low:
                    share = (at - x[i]) / (x[i + 1] - x[i])
                    best = np.fmin(best, y[i] + share * (y[i + 1] - y[i]))
            result[row, column] = values[row, column] - best
    return result


# Rows of the short table that the documentation shows.
SHOWN = (
    "base", "fine-tuned", "Wise-FT 0.7", "Wise-FT 0.5", "MonoSoup", "MonoSoup R=0.8",
    "norm of MonoSoup R=0.8, no SVD", "DG-Hard", "STAR 0.4",
)  # fmt: skip


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results that are there, in the order of the pieces."""
    files = {file.stem: file for file in (folder / "results").glob("*.json")}
    order = [piece.name for piece in PIECES if piece.name in files]
    return {name: json.loads(files[name].read_text("utf-8")) for name in order}


def short_table(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the table that docs/real-models.md shows: ID / OOD of a few methods, a column a piece."""
    cells: dict[str, list[str]] = {label: [label] for label in SHOWN}
    for result in results.values():
        found = scores(result)
        labels = [row["label"] for row in result["rows"]]
        for label, line in cells.items():
            i = labels.index(label) if label in labels else None
            line.append("" if i is None else f"{found.ids[i, 0]:.3f} / {found.ood[i, 0]:.3f}")
    return table(["", *results], list(cells.values()))


def write_report(folder: Path) -> None:
    """Write RESULTS.md and figures beside `results/`."""
    known = read_results(folder)
    order, results = list(known), list(known.values())
    lines = ["# Real pretrained models: results", ""]
    lines += [
        wrapped(
            "Written by `python -m benchmarks.real_models` from `results/`; [DESIGN.md](DESIGN.md) says "
            "what is measured. Bits per byte: lower is better. Differences are paired over the same "
            "windows, intervals are 95 %; * where they leave out zero."
        ),
        "",
    ]
    missing = [piece.name for piece in PIECES if piece.name not in known]
    if any(result["short"] for result in results):
        lines += ["**From a short run: a check that everything works, and no result.**", ""]
    elif missing:
        lines += [wrapped(f"Not run yet: {', '.join(missing)}. The same command goes on with them."), ""]
    partly = [name for name, result in known.items() if not result["complete"]]
    if partly:
        lines += [wrapped(f"Interrupted before all candidates were scored: {', '.join(partly)}."), ""]
    for name, result in zip(order, results, strict=True):
        lines += _piece(name, result, folder)
    (folder / "RESULTS.md").write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def _piece(name: str, result: dict[str, Any], folder: Path) -> list[str]:
    rows = result["rows"]
    found = scores(result)
    curve = [0, *(i for i, row in enumerate(rows) if row["family"] == "Wise-FT")]
    off_test = above_curve(found.ids, found.ood, curve)
    off_validation = above_curve(found.ids, found.validation, curve)
    piece = result["piece"]
    kind = "all weights" if piece["rank"] is None else f"LoRA of rank {piece['rank']}"
    lines = [f"## {name}", ""]
    machine = result["machine"]["processor"]
    lines += [
        wrapped(
            f"SmolLM2-135M-Instruct, {kind}, on {piece['domain']}: AdamW {piece['rate']:g}, {piece['steps']} "
            f"steps, seed {piece['seed']}; {result['seconds']['all'] / 60:.0f} minutes on {machine}."
        ),
        "",
    ]
    cells = []
    for i, row in enumerate(rows):
        on_curve = row["family"] in ("Wise-FT", "ends")
        partition = _partition(result, found, i)
        cells.append(
            [
                row["label"],
                f"{found.ids[i, 0]:.3f}",
                f"{found.ood[i, 0]:.3f}",
                "" if on_curve else _interval(off_test[i]),
                "" if on_curve else _interval(off_validation[i]),
                *partition,
            ]
        )
    heads = ["", "ID", "OOD", "OOD at equal ID, less Wise-FT", "the same on validation", "healed", "retained"]
    lines += [*table(heads, cells), ""]
    figure = _figure(name, result, found, folder)
    if figure:
        lines += [f"![ID against OOD of all candidates]({figure})", ""]
    return lines


def _interval(values: Array) -> str:
    if np.isnan(values[0]):
        return "off the curve"
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    mark = " *" if low > 0 or high < 0 else ""
    return f"{values[0]:+.3f} [{low:+.3f}, {high:+.3f}]{mark}"


def _partition(result: dict[str, Any], found: Scores, row: int) -> list[str]:
    """Return the shares of the damage that is gone and of the gain in ID that is left."""
    damage = gone = 0.0
    for name in result["test"]:
        base, tuned, now = (float(found.by_domain[name][i, 0]) for i in (0, 1, row))
        if tuned > base:
            damage += tuned - base
            gone += tuned - max(base, now)
    gain = float(found.ids[0, 0] - found.ids[1, 0])
    left = float(found.ids[0, 0] - found.ids[row, 0])
    return [
        f"{gone / damage:.0%}" if damage > 0 else "no damage",
        f"{left / gain:.0%}" if gain > 0 else "no gain",
    ]


def _figure(name: str, result: dict[str, Any], found: Scores, folder: Path) -> str | None:
    from benchmarks.robustness.panels import grid, legend, panels, save, style

    figure, (axes,) = panels(1, f"{name}: bits per byte, better is up and to the right")
    families: dict[str, list[int]] = {}
    for i, row in enumerate(result["rows"]):
        if row["family"] in ("ends", "Wise-FT"):
            families.setdefault("Wise-FT, base to fine-tuned", []).append(i)
        elif row["family"] not in ("ablations", "storage"):
            families.setdefault(row["family"], []).append(i)
    for number, (family, members) in enumerate(families.items()):
        members = sorted(members, key=lambda i: result["rows"][i]["alpha"] or 0.0)
        look = style(number)
        if family in ("controls", "search", "LiNeS"):
            look["linestyle"] = ""
        axes.plot(found.ids[members, 0], found.ood[members, 0], label=family, **look)
    axes.set_xlabel(f"ID, {result['in_distribution']} (axis inverted)")
    axes.set_ylabel("mean OOD (axis inverted)")
    axes.invert_xaxis()
    axes.invert_yaxis()
    grid(axes)
    legend(figure, [axes])
    (folder / "figures").mkdir(exist_ok=True)
    save(figure, folder / "figures" / f"{name}.png")
    return f"figures/{name}.png"
