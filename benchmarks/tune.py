"""A candidate of `mergekit-monosoup tune`, put together from parts that are kept, against a linear merge.

Both run in one process, in turn, each into a folder of its own as `merge` would. Before anything is timed,
the candidate is compared with the merge of the same recipe.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import common
import merging
import torch

LAYERS, VOCABULARY = (2, 8_000)
QUICK = (1, 512)
REPEATS = 3


def main() -> None:
    """Write checkpoints, compare, time."""
    options = common.arguments(__doc__ or "").parse_args()
    layers, vocabulary = QUICK if options.quick else (LAYERS, VOCABULARY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merging.write_checkpoints(folder, layers, vocabulary)
        rows, figures = measured(folder, 1 if options.quick else REPEATS)
    table = common.Table("a candidate", ("", "seconds", "over linear"), rows)
    common.report("tune", options, [table], figures, {"layers": layers, "vocabulary": vocabulary})


def measured(folder: Path, repeats: int) -> tuple[list[list[Any]], dict[str, float]]:
    """Return the table's rows and the figures."""
    from mergekit.options import MergeOptions

    from mergekit_monosoup.merging.run import RunOptions, merge_to_folder
    from mergekit_monosoup.registry import register
    from mergekit_monosoup.search.parts_on_disk import PartsOnDisk

    register()
    parts = PartsOnDisk(folder / "parts", 1 << 40)
    quick = MergeOptions(write_model_card=False, quiet=True, copy_tokenizer=False)

    def merge(name: str, recipe: dict[str, object], kept: PartsOnDisk | None) -> None:
        run = RunOptions(overwrite=True, restart=True, report=False, parts=kept)
        merge_to_folder(json.dumps(recipe), folder / name, quick, run)

    edit = merging.recipe(folder, "monosoup") | {"parameters": {"alpha": 0.7, "mixing": "alignment"}}
    linear = merging.recipe(folder, "linear")
    # The first candidate of a split rule finds the parts.
    merge("first", edit, parts)
    merge("candidate", edit, parts)
    merge("merged", edit, None)
    flipped = compare(folder / "candidate", folder / "merged")
    for name in ("first", "candidate", "merged"):
        shutil.rmtree(folder / name)
    best = common.in_turn(
        {
            "linear merge": lambda: merge("linear", linear, None),
            "candidate": lambda: merge("candidate", edit, parts),
            "merge of the same recipe": lambda: merge("merged", edit, None),
        },
        repeats,
    )
    rows = [[name, seconds, seconds / best["linear merge"]] for name, seconds in best.items()]
    figures = {
        "candidate over linear, time": best["candidate"] / best["linear merge"],
        "share of entries that differ from the merge": flipped,
        "bytes of scratch": float(parts.held),
    }
    return rows, figures


def compare(one: Path, other: Path) -> float:
    """Return the share of entries that differ; by more than a unit in the last place, none may."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    differ = total = 0
    for name, tensor in first.items():
        a, b = tensor.float(), second[name].float()
        # One unit in the last place of bfloat16, and what float32 rounds of the sums before it.
        allowed = 2.0**-7 * torch.maximum(a.abs(), b.abs()) + 2.0**-19 * a.abs().max()
        assert bool(((a - b).abs() <= allowed).all()), name
        differ += int((a != b).sum())
        total += tensor.numel()
    return differ / total


if __name__ == "__main__":
    main()
