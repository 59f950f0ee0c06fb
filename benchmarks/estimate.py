"""What `plan` says of time and memory against the merge itself, as ratios: 1 is exact, 1.5 the promise."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import common
from common import Table, run_child
from merging import recipe, write_checkpoints

# layers, vocabulary, fine-tuned models: in the shape of Qwen3-0.6B
SIZES = ((2, 4096, 1), (4, 4096, 1), (2, 65_536, 1), (4, 4096, 2), (12, 32_768, 1))
QUICK = ((1, 1024, 1),)
METHODS = ("monosoup", "linear")
COMMAND = (sys.executable, "-m", "mergekit_monosoup")


def main() -> None:
    """Plan and merge in turn, and report the ratios."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes, smallest first")
    options = parser.parse_args()
    columns = (
        "merge",
        "seconds",
        "planned",
        "ratio",
        "on all cores",
        "ratio",
        "peak MiB",
        "planned",
        "ratio",
    )
    note = (
        "ratios are of the plan's figure to the merge's; on all cores: the merge's processor time, start-up "
        "left out of the division, which other work on the machine does not change much"
    )
    table = Table("plan against merge", columns, note=note)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-estimate-") as name:
        for layers, vocabulary, tuned in QUICK if options.quick else SIZES[: options.sizes]:
            folder = Path(name) / f"{layers}-{vocabulary}-{tuned}"
            write_checkpoints(folder, layers, vocabulary, tuned)
            for method in METHODS:
                label = f"{method}, {layers} layers, {vocabulary} tokens, {tuned} tuned"
                row = compared(folder, method, tuned)
                table.add(label, *row)
                print(label, *map(common.shown, row), flush=True)
                figures |= {f"{label}: time": row[2], f"{label}: peak memory": row[7]}
            shutil.rmtree(folder)
    common.report("estimate", options, [table], figures)


def compared(folder: Path, method: str, tuned: int) -> list[float]:
    """Plan and run one merge; seconds, plan, ratio, the same by processor time, and of memory."""
    file, out = folder / "config.yml", folder / "merged"
    file.write_text(json.dumps(recipe(folder, method, tuned)), encoding="utf-8")
    planned = json.loads(run_child([*COMMAND, "plan", file, "--json"]).output)["estimate"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = run_child([*COMMAND, "merge", file, out, "--no-copy-tokenizer", "--quiet"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(out)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    start = planned["start_seconds"]
    shared = start + max(0.0, cpu - start) / (os.cpu_count() or 1)
    seconds, peak = planned["seconds"], planned["peak_bytes"]
    return [
        run.seconds, seconds, seconds / run.seconds, shared, seconds / shared,
        run.peak / 2**20, peak / 2**20, peak / run.peak,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
