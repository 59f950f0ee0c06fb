"""RESULTS.md and the figures, from the result files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.robustness import evidence, tables
from benchmarks.robustness.findings import findings
from benchmarks.robustness.markdown import Scale, table, wrapped
from benchmarks.robustness.summary import Result, full_recipes, lora_recipes

HERE = Path(__file__).resolve().parent
ORDER = ("language", "vit", "convnet")


def write_report(out: Path) -> Path:
    """Write figures/ and RESULTS.md beside results/ in `out`; return the page's path."""
    results = read_results(out / "results")
    figures = _draw(results, out / "figures")
    page = out / "RESULTS.md"
    page.write_text(as_page(results, [f"figures/{file.name}" for file in figures]), "utf-8")
    return page


def read_results(folder: Path) -> list[Result]:
    """Return the result files, tracks of the study first."""
    found = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))}
    return [found[name] for name in (*ORDER, *sorted(set(found) - set(ORDER))) if name in found]


def _draw(results: Sequence[Result], folder: Path) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from benchmarks.robustness.figures import draw_track

    return [file for result in results for file in draw_track(result, folder)]


def as_page(results: Sequence[Result], figures: Sequence[str] = ()) -> str:
    """Return RESULTS.md."""
    lines = [
        "# The robustness study: results",
        "",
        "Written by `python -m benchmarks.robustness` from the files in `results/` (`--report-only` writes "
        "this page anew), the paper's numbers in `paper.json` and the text of `discussion.md`; do not edit "
        "it. [DESIGN.md](DESIGN.md) says what was done and was written before the run.",
    ]
    if any(result["short"] for result in results):
        lines += ["", "**From a short run: a check that everything works, and no result.**"]
    lines += ["", "## What the tracks say", "", *_verdicts(results)]
    lines += _included(HERE / "discussion.md")
    for result in results:
        own = [name for name in figures if Path(name).name.startswith(f"{result['track']}-")]
        lines += _track(result, own)
    lines += ["", "## The threshold of SFGS", "", *_thresholds(results)]
    lines += _paper(HERE / "paper.json")
    lines += ["", "## Machine, versions, time", "", *_circumstances(results)]
    return "\n".join(_wrapped(line) for line in lines) + "\n"


def _wrapped(line: str) -> str:
    """Wrap prose; tables, figures and what was written by hand stay as they are."""
    return line if "\n" in line or line.startswith(("|", "#", "![")) else wrapped(line)


def _verdicts(results: Sequence[Result]) -> list[str]:
    made = {result["track"]: {f.hypothesis: f for f in findings(result)} for result in results}
    hypotheses = list(dict.fromkeys(name for found in made.values() for name in found))
    columns = ["direction reported in the paper", *made]
    body = [
        [name, *(found[name].verdict if name in found else "nothing to compare" for found in made.values())]
        for name in hypotheses
    ]
    lines = table(columns, body)
    lines += [
        "",
        "agrees: on average and in at least three quarters of the cases; does not agree: not on average and "
        "in at most a quarter; mixed: anything else. The cases are fine-tuned checkpoints (recipe and seed), "
        "points of curves, or pools. Numbers keep the measure's own direction: of bits per byte, a minus is "
        "a gain.",
    ]
    for track, found in made.items():
        lines += ["", f"**{track}**", "", *(f"- {finding.sentence}" for finding in found.values())]
    return lines


def _track(result: Result, figures: Sequence[str]) -> list[str]:
    scale = Scale(result)
    lines = ["", f"## {result['track']}", "", f"{result['architecture']}. Scores: {scale.unit}; ID is "]
    lines[-1] += f"{result['in_distribution']}, mean OOD the mean of {', '.join(result['shifts'])}."
    full = [r for r in result["recipes"] if r["lora_rank"] is None]
    count = len(full) * len(result["seeds"])
    lines += ["", *_recipes(result), "", f"### All {count} full fine-tunes", ""]
    lines += [
        "Means ± standard deviations over recipes and seeds; changes are paired with the fine-tuned one.",
        "",
    ]
    lines += tables.overview(result)
    for recipe in full_recipes(result):
        lines += ["", f"### {recipe}", "", f"Over seeds {', '.join(map(str, result['seeds']))}.", ""]
        lines += tables.of_recipe(result, recipe)
    lines += ["", "### Wise-FT with and without MonoSoup", "", *tables.curves(result)]
    if lora_recipes(result):
        lines += ["", "### LoRA", "", *tables.of_adapters(result)]
    if result["pools"]:
        lines += ["", "### Soups", *_over_seeds(result), *tables.pools(result)]
        lines += ["", "### Who keeps which candidate"]
        lines += tables.decisions(result)
    return [*lines, *_images(figures)]


def _over_seeds(result: Result) -> list[str]:
    rows = tables.soups_over_seeds(result)
    if not rows:
        return []
    return [
        "",
        "The recipes of one seed make one pool. Means ± standard deviations over these pools; changes are "
        "paired with the best single checkpoint; members of each pool's soup in the order of the seeds.",
        "",
        *rows,
    ]


def _recipes(result: Result) -> list[str]:
    columns = ["recipe", "learning rate", "schedule", "steps", "weight decay", "LoRA rank"]
    keys = ("name", "learning_rate", "schedule", "steps", "weight_decay", "lora_rank")
    rows = [["–" if recipe[key] is None else recipe[key] for key in keys] for recipe in result["recipes"]]
    return table(columns, rows)


def _thresholds(results: Sequence[Result]) -> list[str]:
    with_pools = [result for result in results if result["pools"]]
    if not with_pools:
        return ["No pools."]
    best, same, asked = evidence.best_thresholds(with_pools)
    refused = evidence.refused(with_pools)
    harmless = ", ".join(f"{threshold:g}" for threshold, count in refused.items() if count == 0)
    others = ", ".join(f"{count} at {threshold:g}" for threshold, count in refused.items() if count)
    return [
        *evidence.threshold_table(with_pools),
        "",
        "as greedy: how many decisions on candidates, the first left out, are those of greedy soup, over "
        "all pools; kept: candidates kept, the first left out. The scores' differences are means over the "
        "pools, in the measure's own direction. Pools share checkpoints, so their decisions are not "
        "independent.",
        "",
        f"Closest to greedy soup: {', '.join(f'{t:g}' for t in best)}, with {same} of {asked} decisions. "
        f"Candidates that greedy soup keeps and SFGS refuses: none at {harmless or '–'}; {others or 'none'}.",
    ]


def _paper(file: Path) -> list[str]:
    if not file.exists():
        return []
    paper = json.loads(file.read_text("utf-8"))
    lines = ["", "## The paper's own numbers", "", f"{paper['source']}. {paper['how']}"]
    for name in dict.fromkeys(row["table"] for row in paper["rows"]):
        rows = [row for row in paper["rows"] if row["table"] == name]
        metrics = list(dict.fromkeys(row["metric"] for row in rows))
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for row in rows:
            unit = "" if row["unit"] == "1" else f" {row['unit']}"
            cells.setdefault((row["model"], row["method"]), {})[row["metric"]] = f"{row['value']}{unit}"
        body = [
            [f"{m}, {method}", *(found.get(x, "") for x in metrics)] for (m, method), found in cells.items()
        ]
        sources = ", ".join(dict.fromkeys(_linked(row["source"]) for row in rows))
        lines += ["", f"### {name}", "", *table(["model, method", *metrics], body), "", f"Source: {sources}"]
    for title, key in (("Findings without numbers", "findings"), ("Not found", "not_found")):
        lines += ["", f"### {title}", "", *(f"- {_finding(item)}" for item in paper.get(key, []))]
    return lines


def _finding(item: Any) -> str:
    return item if isinstance(item, str) else f"{item['what']} ({_linked(item['source'])})"


def _linked(source: str) -> str:
    return f"<{source}>" if source.startswith("https://") else source


def _circumstances(results: Sequence[Result]) -> list[str]:
    first = results[0]
    lines = [f"- {key}: {value}" for key, value in first["machine"].items()]
    lines.append(
        f"- libraries of the training: {', '.join(f'{k} {v}' for k, v in first['versions'].items())}"
    )
    for result in results:
        minutes = result["seconds"]["work"] / 60
        lines.append(f"- {result['track']}: {minutes:.1f} minutes of work on one thread, all jobs together")
    walls = {round(r["seconds"]["wall of the whole command"] / 60, 1) for r in results}
    fresh = {r["seconds"]["jobs done in this run, all tracks"] for r in results}
    lines.append(
        f"- the command that wrote the result files: {', '.join(map(str, sorted(walls)))} minutes, "
        f"{', '.join(map(str, sorted(fresh)))} jobs done in it, {first['seconds']['workers']} workers of one "
        "thread each"
    )
    return lines


def _images(figures: Sequence[str]) -> list[str]:
    return [line for name in figures for line in ("", f"![{Path(name).stem.replace('-', ' ')}]({name})")]


def _included(file: Path) -> list[str]:
    return ["", file.read_text("utf-8").rstrip()] if file.exists() else []
