"""Time and peak memory of whole merges, as ratios to `linear` by stock mergekit-yaml on the same files."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import common
from common import Run, Table
from merging import hook_is_installed, merge, methods, recipe, verify, write_checkpoints

FULL = {"layers": 28, "vocabulary": 151_936}
QUICK = {"layers": 4, "vocabulary": 4096}
# Embeddings above this many entries are not decomposed in float64 by the check.
LARGEST_CHECKED = 8_000_000
OWN = "monosoup by mergekit-monosoup merge"
# Shards small enough that writing one can overlap computing the next.
ASYNC = ("--async-write", "--out-shard-size", "400M")


def main() -> None:
    """Check on a small pair, then run the merges in turn and report."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--turns", type=int, default=2, help="how often linear and monosoup are run")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go, 5 GB; default: temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-merge-") as name:
        _run(Path(name), options)


def _run(folder: Path, options: argparse.Namespace) -> None:
    compared = _check(folder / "small")
    ours = methods()
    several = [method for method in ("model_stock_stable", "sfgs") if method in ours]
    size = QUICK if options.quick else FULL
    full = folder / "full"
    write_checkpoints(full, size["layers"], size["vocabulary"], tuned=2 if several else 1)

    runs: dict[str, list[Run]] = {}

    def run(label: str, method: str, tuned: int, *flags: str, ours: bool = False) -> None:
        found = merge(full, recipe(full, method, tuned), *flags, ours=ours)
        runs.setdefault(label, []).append(found)
        print(f"{label}: {found.seconds:.1f} s, {found.peak / 2**20:.0f} MiB", flush=True)

    for turn in range(options.turns):
        run("linear", "linear", 1)
        run("monosoup", "monosoup", 1)
        run(OWN, "monosoup", 1, ours=True)
        if turn == 0:
            run("monosoup --async-write", "monosoup", 1, *ASYNC)
            if several:
                run("linear, 3 models", "linear", 2)
            for method in several:
                run(f"{method}, 3 models", method, 2)
    copy = 4 * size["vocabulary"] * 1024
    table = _table(runs, copy)
    seconds = {label: min(r.seconds for r in found) for label, found in runs.items()}
    peaks = {label: statistics.median(r.peak for r in found) for label, found in runs.items()}
    figures = {
        "monosoup over linear, time": seconds["monosoup"] / seconds["linear"],
        f"{OWN} over linear, time": seconds[OWN] / seconds["linear"],
        f"{OWN} over linear, peak memory": peaks[OWN] / peaks["linear"],
        "monosoup --async-write over linear, time": seconds["monosoup --async-write"] / seconds["linear"],
        "monosoup above linear, peak memory in copies": (peaks["monosoup"] - peaks["linear"]) / copy,
    }
    for method in several:
        label = f"{method}, 3 models"
        figures[f"{method} over linear, time"] = seconds[label] / seconds["linear, 3 models"]
        figures[f"{method} above linear, peak memory in copies"] = (
            peaks[label] - peaks["linear, 3 models"]
        ) / copy
    command = (
        "stock mergekit-yaml by the start-up hook"
        if hook_is_installed()
        else "mergekit's own main, methods registered"
    )
    details = {**size, "tensors compared with float64 beforehand": compared, "command": command}
    common.report("merge", options, [table], figures, details)


def _check(folder: Path) -> int:
    """Merge a pair of one layer and compare every tensor with float64."""
    write_checkpoints(folder, layers=1, vocabulary=1536)
    compared = 0
    for method in ("linear", "monosoup"):
        out = folder / method
        merge(folder, recipe(folder, method), keep=out)
        compared += verify(folder, out, method, LARGEST_CHECKED)
    return compared


def _table(runs: dict[str, list[Run]], copy: int) -> Table:
    columns = ("merge", "runs", "seconds", "over linear", "peak MiB", "above linear, copies")
    note = (
        "whole processes, start-up and writing included; shortest time, median peak; copies are float32 "
        "copies of the largest matrix, the embedding. Merges of three models are compared with linear "
        "on the same three."
    )
    table = Table("merges of a generated pair in bf16, in the shape of Qwen3-0.6B", columns, note=note)
    for label, found in runs.items():
        reference = runs["linear, 3 models" if label.endswith("3 models") else "linear"]
        seconds, peak = min(r.seconds for r in found), statistics.median(r.peak for r in found)
        over = seconds / min(r.seconds for r in reference)
        above = (peak - statistics.median(r.peak for r in reference)) / copy
        table.add(label, len(found), seconds, over, peak / 2**20, above)
    return table


if __name__ == "__main__":
    main()
