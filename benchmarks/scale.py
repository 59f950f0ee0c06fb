"""One merge here, and on Ray with one and with two workers of one core each: speed-up, overhead, memory.

The cluster runs in this machine, and is started for each merge as `--ray local` does it; its start-up, which
does not grow with the model, is what a merge of a single layer takes on it more than here. The driver's
memory is what it peaks at for a pair and for one three times as large.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
from common import Table, run_child
from merging import recipe, verify, write_checkpoints

CHILD = Path(__file__)
# Newer versions of Ray ask for a token, which a cluster of this machine alone can do without.
CLUSTER = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
VOCABULARY = 2048
# Those of the smaller pair that are no larger are compared with float64, which takes longer than the merges.
LARGEST = 1_100_000


@dataclass(frozen=True)
class Merged:
    """Seconds from the first unit to the last, of the whole call, and the peak of this process in bytes."""

    units: float
    whole: float
    peak: int


def main() -> None:
    """Measure in child processes and report."""
    parser = common.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of the pair in the shape of Qwen3-0.6B")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(merged(*options.child)))
        return
    layers = 2 if options.quick else options.layers
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as name:
        folder = Path(name)
        for label, count in (("pair", layers), ("third", -(-layers // 3))):
            (folder / label).mkdir()
            write_checkpoints(folder / label, count, VOCABULARY)
        size = sum(file.stat().st_size for file in (folder / "pair").rglob("*.safetensors"))
        here = child(folder / "pair", 0)
        runs = {"here, one core": here}
        for workers in (1, 2):
            runs[f"Ray, {workers} worker{'s' * (workers > 1)}"] = child(folder / "pair", workers)
            same_bytes(folder / "pair" / "out0", folder / "pair" / f"out{workers}")
        third = child(folder / "third", 1)
        compared = verify(folder / "third", folder / "third" / "out1", "monosoup", LARGEST)
    table = Table(
        f"a pair of {size / 2**20:.0f} MiB, {layers} layers; {compared} tensors compared with float64",
        ("merge", "units, s", "whole call, s", "start-up and end, s", "driver's peak, MiB"),
        note="units: from the first that begins to the last that is written, workers being at hand",
    )
    for label, run in runs.items():
        table.add(label, run.units, run.whole, run.whole - run.units, run.peak / 2**20)
    table.add("Ray, 1 worker, a third of the layers", third.units, third.whole, third.whole - third.units,
              third.peak / 2**20)  # fmt: skip
    one, two = runs["Ray, 1 worker"], runs["Ray, 2 workers"]
    figures = {
        "speed-up of two workers over one": one.units / two.units,
        "Ray over here on one core, beside its start-up": one.units / here.units - 1,
        "start-up, s": (one.whole - one.units) - (here.whole - here.units),
        "driver's peak over that of a third of the layers": one.peak / third.peak,
        "MB/s of input, one core": size / 1e6 / here.units,
    }
    common.report("scale", options, [table], figures, {"input bytes": size})


def child(folder: Path, workers: int) -> Merged:
    """Merge a pair in a process of its own: here where there are no workers."""
    command = [sys.executable, CHILD, "--child", str(folder), str(folder / f"out{workers}"), str(workers)]
    found = json.loads(run_child(command, {**CLUSTER, **ONE_CORE}).output.splitlines()[-1])
    return Merged(**found)


def same_bytes(first: Path, second: Path) -> None:
    """Refuse to time merges that do not come to the same.

    Raises:
        RuntimeError: a file of weights differs.
    """
    for file in first.glob("*.safetensors"):
        if file.read_bytes() != (second / file.name).read_bytes():
            raise RuntimeError(f"{second / file.name} is not what a local merge writes")


def merged(folder: str, out: str, workers: str) -> dict[str, float]:
    """Merge in this process, and return the times and the peak."""
    import resource

    from mergekit.options import MergeOptions

    from mergekit_monosoup.cluster.connection import RayOptions
    from mergekit_monosoup.merging import run as running
    from mergekit_monosoup.registry import register

    register()
    count = int(workers)
    times: list[float] = []
    written = running.Run._written

    def noted(self: running.Run, *arguments: object) -> None:
        times.append(time.perf_counter())
        written(self, *arguments)  # type: ignore[arg-type]

    running.Run._written = noted  # type: ignore[method-assign]
    started = time.perf_counter()
    if count:
        import ray

        ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False)
    shutil.rmtree(out, ignore_errors=True)
    options = running.RunOptions(ray=RayOptions("local") if count else None)
    text = json.dumps(recipe(Path(folder), "monosoup"))
    running.merge_to_folder(text, Path(out), MergeOptions(quiet=True), options)
    whole = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"units": times[-1] - times[0], "whole": whole, "peak": peak}


if __name__ == "__main__":
    main()
