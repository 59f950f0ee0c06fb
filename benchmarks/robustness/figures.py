"""The figures of a track, from its result file alone (its form: results.py).

Where a lower score is better, axes run the other way: up and to the right is always better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.robustness.panels import axis, grid, legend, orient, panels, save, style
from benchmarks.robustness.summary import Point, Result, full_recipes, id_of, mean_and_spread, ood_of

_ID, _OOD = "#0072B2", "#D55E00"
# Method -> colour, marker.
_POINTS: dict[str, tuple[str, str]] = {
    "base": ("#000000", "s"),
    "fine-tuned": ("#000000", "o"),
    "MonoSoup": ("#D55E00", "*"),
    "MonoSoup R=0.8": ("#D55E00", "P"),
    "LiNeS (0.1, 0.9)": ("#009E73", "v"),
    "LiNeS (0.5, 0.5)": ("#009E73", "^"),
    "uniform soup": ("#CC79A7", "D"),
    "greedy soup": ("#CC79A7", "d"),
    "Model Stock (stable)": ("#E69F00", "X"),
    "MonoSoup of the average": ("#56B4E9", "*"),
    "MonoSoup R=0.8 of the average": ("#56B4E9", "P"),
}
_CURVES = {
    "wise-ft": ("Wise-FT", "fine-tuned", "#0072B2", "--"),
    "monosoup-wise-ft": ("MonoSoup → Wise-FT", "MonoSoup", "#D55E00", "-"),
}


def draw_track(result: Result, folder: Path) -> list[Path]:
    """Draw every figure of a track for which the result has numbers; return the PNG files written."""
    plots: dict[str, Callable[[Result], Figure | None]] = {
        "scatter": scatter,
        "curves": curves,
        "lambda": coefficients,
        "cka": similarity,
        "sfgs": thresholds,
    }
    written = []
    for name, plot in plots.items():
        figure = plot(result)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{result['track']}-{name}.png"
            save(figure, path)
            written.append(path)
    return written


def scatter(result: Result) -> Figure | None:
    """Draw ID against OOD, a panel a recipe: mean and standard deviation over seeds, and both curves."""
    recipes = full_recipes(result)
    if not recipes:
        return None
    figure, row = panels(
        len(recipes), f"{result['track']}: ID against OOD, mean ± standard deviation over seeds", share=True
    )
    for axes, recipe in zip(row, recipes, strict=True):
        for family, (label, end, colour, dash) in _CURVES.items():
            curve = [_mean(points) for _, points in _curve(result, recipe, family, end)]
            axes.plot(*zip(*curve, strict=True), dash, color=colour, label=label, linewidth=1.4, zorder=2)
            axes.plot(*zip(*curve, strict=True), ".", color=colour, markersize=5, zorder=2)
        for method, points in _scattered(result, recipe).items():
            colour, marker = _POINTS[method]
            (x, y), (dx, dy) = _mean(points), _spread(points)
            axes.errorbar(
                x,
                y,
                xerr=dx,
                yerr=dy,
                fmt=marker,
                color=colour,
                markersize=11 if marker == "*" else 7,
                mec="white",
                mew=0.6,
                elinewidth=0.8,
                capsize=2,
                label=method,
                zorder=3,
            )
        axes.set_title(recipe)
        axes.set_xlabel(axis(result, "ID test"))
        orient(result, axes, "x")
        orient(result, axes, "y")
    row[0].set_ylabel(axis(result, "OOD tests, mean over shifts"))
    legend(figure, row)
    return figure


def curves(result: Result) -> Figure | None:
    """Draw ID and OOD against alpha for Wise-FT and for MonoSoup followed by it, a panel a recipe."""
    recipes = full_recipes(result)
    if not recipes:
        return None
    title = f"{result['track']}: from the base (α = 0) to the checkpoint (α = 1)"
    figure, row = panels(len(recipes), title, share=True)
    for axes, recipe in zip(row, recipes, strict=True):
        for family, (label, end, _, dash) in _CURVES.items():
            points = _curve(result, recipe, family, end)
            alphas = [alpha for alpha, _ in points]
            for side, (name, colour) in enumerate((("ID", _ID), ("OOD", _OOD))):
                means = [_mean(each)[side] for _, each in points]
                spreads = [_spread(each)[side] for _, each in points]
                axes.plot(
                    alphas,
                    means,
                    dash,
                    color=colour,
                    marker="o" if family == "wise-ft" else "*",
                    markersize=4 if family == "wise-ft" else 7,
                    linewidth=1.5,
                    label=f"{name}, {label}",
                )
                low, high = zip(*((m - s, m + s) for m, s in zip(means, spreads, strict=True)), strict=True)
                axes.fill_between(alphas, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_title(recipe)
        axes.set_xlabel("α (share of the update)")
        orient(result, axes, "y")
    row[0].set_ylabel(axis(result))
    legend(figure, row)
    return figure


def coefficients(result: Result) -> Figure | None:
    """Draw MonoSoup's lambda_low against the block for each kind of tensor, a panel a recipe."""
    recipes = full_recipes(result)
    records = [r for r in result.get("lambdas", ()) if r["block"] is not None]
    if not records:
        return None
    figure, row = panels(
        len(recipes), f"{result['track']}: MonoSoup's λ_low, mean ± standard deviation over seeds", share=True
    )
    kinds = sorted({r["kind"] for r in records})
    for axes, recipe in zip(row, recipes, strict=True):
        for number, kind in enumerate(kinds):
            chosen = [r for r in records if r["recipe"] == recipe and r["kind"] == kind]
            blocks = sorted({r["block"] for r in chosen})
            values = [[r["lambda_low"] for r in chosen if r["block"] == block] for block in blocks]
            axes.errorbar(
                [block + 0.03 * (number - len(kinds) / 2) for block in blocks],
                [fmean(v) for v in values],
                yerr=[_deviation(v) for v in values],
                **style(number),
                capsize=2,
                elinewidth=0.8,
                label=kind,
            )
        axes.set_title(recipe)
        axes.set_xlabel("block (index, 0 = next to the input)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    row[0].set_ylabel("λ_low (factor on the low-energy part)")
    legend(figure, row)
    return figure


def similarity(result: Result) -> Figure | None:
    """Draw linear CKA by block with the base and with the fine-tuned checkpoint, on ID and OOD inputs."""
    records = result.get("cka", ())
    if not records:
        return None
    sides = [to for to in ("base", "fine-tuned") if any(r["to"] == to for r in records)]
    figure = Figure(figsize=(9.5, 1 + 2.7 * len(sides)), layout="constrained")
    cells = figure.subplots(len(sides), 2, squeeze=False, sharex=True, sharey="row")
    figure.suptitle(f"{result['track']}: linear CKA of the blocks' outputs, mean over recipes, one seed each")
    methods = list(dict.fromkeys(r["method"] for r in records))
    for row, to in zip(cells, sides, strict=True):
        for axes, inputs in zip(row, ("id", "ood"), strict=True):
            for number, method in enumerate(methods):
                runs = [
                    r["values"]
                    for r in records
                    if (r["method"], r["to"], r["inputs"]) == (method, to, inputs) and method != to
                ]
                if not runs:
                    continue
                means = [fmean(values) for values in zip(*runs, strict=True)]
                axes.plot(range(len(means)), means, **style(number), label=method)
            axes.set_title(f"with the {to} model, {inputs.upper()} inputs")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            grid(axes)
        row[0].set_ylabel("linear CKA (1 = same)")
    for axes in cells[-1]:
        axes.set_xlabel("block (index, 0 = next to the input)")
    legend(figure, cells.flat)
    return figure


def thresholds(result: Result) -> Figure | None:
    """Draw SFGS against its threshold: ID, OOD and the members kept; uniform and greedy soup as lines."""
    pools = [pool for pool in result.get("pools", ()) if pool["sfgs"]]
    if not pools:
        return None
    pool = next((p for p in pools if p["pool"] == "all"), pools[0])
    entries = sorted(pool["sfgs"], key=lambda entry: entry["threshold"])
    levels = [entry["threshold"] for entry in entries]
    title = f"{result['track']}: SFGS, pool {pool['pool']} of {len(pool['members'])} checkpoints"
    figure, row = panels(3, title)
    soups = {row["method"]: _point(result, row["scores"]) for row in pool["rows"]}
    for side, name in enumerate(("ID test", "OOD tests, mean over shifts")):
        axes = row[side]
        values = [_point(result, entry["scores"])[side] for entry in entries]
        axes.plot(levels, values, "-o", color="#D55E00", label="SFGS", markersize=5)
        for method, colour, dash in (
            ("uniform soup", "#CC79A7", "--"),
            ("greedy soup", "#009E73", "-."),
            ("best single", "#000000", ":"),
        ):
            if method in soups:
                axes.axhline(soups[method][side], color=colour, linestyle=dash, label=method)
        axes.set_title(name)
        axes.set_ylabel(axis(result))
        orient(result, axes, "y")
    kept = row[2]
    kept.plot(levels, [len(entry["taken"]) for entry in entries], "-o", color="#D55E00", markersize=5)
    kept.axhline(len(pool["members"]), color="#CC79A7", linestyle="--")
    kept.axhline(len(pool["greedy"]["taken"]), color="#009E73", linestyle="-.")
    kept.axhline(1, color="#000000", linestyle=":")
    kept.set_title("checkpoints kept")
    kept.set_ylabel("count")
    kept.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in row:
        axes.set_xlabel("threshold (average cosine)")
    legend(figure, row)
    return figure


def _point(result: Result, scores: dict[str, float]) -> Point:
    return id_of(result, scores), ood_of(result, scores)


def _scattered(result: Result, recipe: str) -> dict[str, list[Point]]:
    """Return the points of each method over the seeds of a recipe."""
    found: dict[str, list[Point]] = {"base": [_point(result, result["base"]["scores"])]}
    for row in result["rows"]:
        if row["recipe"] == recipe:
            found.setdefault(row["method"], []).append(_point(result, row["scores"]))
    for pool in result.get("pools", ()):
        if pool["pool"] == recipe:
            for row in pool["rows"]:
                found.setdefault(row["method"], []).append(_point(result, row["scores"]))
    return {method: found[method] for method in _POINTS if method in found}


def _curve(result: Result, recipe: str, family: str, end: str) -> list[tuple[float, list[Point]]]:
    """Return alpha and the points over seeds, from the base at 0 to the checkpoint `end` at 1."""
    curve: dict[float, list[Point]] = {0.0: [_point(result, result["base"]["scores"])]}
    for row in result["rows"]:
        if row["recipe"] == recipe and (row["family"] == family or row["method"] == end):
            alpha = row["alpha"] if row["family"] == family else 1.0
            curve.setdefault(alpha, []).append(_point(result, row["scores"]))
    return sorted(curve.items())


def _mean(points: Sequence[Point]) -> Point:
    x, y = zip(*points, strict=True)
    return fmean(x), fmean(y)


def _spread(points: Sequence[Point]) -> Point:
    x, y = zip(*points, strict=True)
    return _deviation(x), _deviation(y)


def _deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; 0 of a single value, whose bar is then not seen."""
    return mean_and_spread(values)[1] or 0.0
