"""Merges of a 70B and a 400B pair on many nodes, on paper; writes the tables into docs/scale.md.

Counts operations and bytes of every matrix of the two shapes. What a core does in a second is what
`results/spectral.json` has measured; what a GPU does was measured on one H100. Links and file system are
assumptions, which the page names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import common  # noqa: F401 - puts the package on the path
from results import markdown

from mergekit_monosoup.merging.units import operations

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "scale.md"
BEGIN, END = "<!-- table: benchmarks/scale_model.py -->", "<!-- end of table -->"
NODES = (1, 8, 64)
# Measured on one H100: float64 eigh of 5120 x 5120 in seconds, float64 matrix product in operations a second.
EIGH_SIDE, EIGH_SECONDS, GPU_FLOPS = 5120, 0.25, 60e12
# Assumed: of a node, and of the file system as a whole.
CORES, GPUS, LINK, FILE_SYSTEM = 32, 8, 3e9, 20e9


@dataclass(frozen=True)
class Shape:
    """A model in the shape of Llama 3.1, untied, in bf16."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int = 1024
    vocabulary: int = 128_256

    def matrices(self) -> Iterator[tuple[str, tuple[int, int], int]]:
        """Yield name, shape and number of the matrices; what is no matrix takes next to nothing."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        yield "q_proj, o_proj", (h, h), 2 * self.layers
        yield "k_proj, v_proj", (kv, h), 2 * self.layers
        yield "gate_proj, up_proj", (i, h), 2 * self.layers
        yield "down_proj", (h, i), self.layers
        yield "embed_tokens, lm_head", (self.vocabulary, h), 2


SHAPES = (Shape("70B", 80, 8192, 28_672), Shape("400B", 126, 16_384, 53_248))


def core_flops() -> float:
    """Return what a core does in a second in the units of `operations`, from the layers of Qwen3-0.6B."""
    result = json.loads((HERE / "results" / "spectral.json").read_text("utf-8"))
    table = next(t for t in result["tables"] if t["title"].startswith("tuned update in bf16"))
    counted = seconds = 0.0
    for name, shape, count, _, milliseconds, *_ in table["rows"]:
        if shape:
            rows, columns = map(int, re.findall(r"\d+", shape))
            counted += int(count) * operations(name, (rows, columns))
            seconds += int(count) * milliseconds / 1e3
    return counted / seconds / int(result["machine"]["cores"])


def on_core(shape: tuple[int, int]) -> float:
    """Return the seconds of a matrix on one core."""
    return operations("", shape) / core_flops()


def on_gpu(shape: tuple[int, int]) -> float:
    """Return the seconds of a matrix on one H100: two products, and eigenvectors that go by r^3."""
    r, c = min(shape), max(shape)
    return 4.0 * r * r * c / GPU_FLOPS + EIGH_SECONDS * (r / EIGH_SIDE) ** 3


@dataclass(frozen=True)
class Cost:
    """What bounds a merge on some nodes, in seconds."""

    computing: float
    longest: float
    reading: float
    writing: float
    driver: float
    """All output through one link, where workers do not see the output's folder."""

    @property
    def shared(self) -> float:
        """Seconds where they see it: all of it overlaps, and the slowest bounds it."""
        return max(self.computing, self.longest, self.reading, self.writing)

    @property
    def bound(self) -> str:
        """What the slowest is."""
        slowest = {
            self.computing: "computing",
            self.longest: "the longest tensor",
            self.reading: "reading",
            self.writing: "writing",
        }
        return slowest[self.shared]


def cost(shape: Shape, nodes: int, gpu: bool) -> Cost:
    """Return the bounds of a merge of two checkpoints of a shape."""
    seconds = on_gpu if gpu else on_core
    workers = nodes * (GPUS if gpu else CORES)
    times = [(seconds(matrix), count) for _, matrix, count in shape.matrices()]
    size = sum(2.0 * math.prod(matrix) * count for _, matrix, count in shape.matrices())
    rate = min(nodes * LINK, FILE_SYSTEM)
    total = sum(time * count for time, count in times)
    return Cost(
        total / workers,
        max(time for time, _ in times),
        2 * size / rate,
        size / rate,
        size / min(LINK, FILE_SYSTEM),
    )


def stops_at(shape: Shape, gpu: bool, embedding: bool = True) -> int:
    """Return the number of workers that have as much to do as the longest tensor takes."""
    seconds = on_gpu if gpu else on_core
    matrices = [
        (seconds(m), count) for name, m, count in shape.matrices() if embedding or "embed" not in name
    ]
    return math.ceil(sum(time * count for time, count in matrices) / max(time for time, _ in matrices))


def page() -> str:
    """Return the tables as Markdown."""
    rows = []
    for shape in SHAPES:
        for gpu in (False, True):
            for nodes in NODES:
                found = cost(shape, nodes, gpu)
                workers = f"{nodes * GPUS} GPUs" if gpu else f"{nodes * CORES} cores"
                apart = max(found.shared, found.driver)
                rows.append([shape.name, nodes, workers, _time(found.shared), found.bound, _time(apart)])
    stops = []
    for shape in SHAPES:
        for gpu in (False, True):
            least = min((on_gpu if gpu else on_core)(m) for _, m, _ in shape.matrices())
            longest = max((on_gpu if gpu else on_core)(m) for _, m, _ in shape.matrices())
            both = (stops_at(shape, gpu), stops_at(shape, gpu, embedding=False))
            stops.append([shape.name, "GPU" if gpu else "core", _time(least), _time(longest), *both])
    sizes = {s.name: sum(2 * math.prod(m) * n for _, m, n in s.matrices()) for s in SHAPES}
    counted = {s.name: sum(operations("", m) * n for _, m, n in s.matrices()) for s in SHAPES}
    said = "; ".join(
        f"{name}: {2 * size / 1e9:.0f} GB read, {size / 1e9:.0f} GB written, {counted[name]:.1e} operations"
        for name, size in sizes.items()
    )
    return "\n".join(
        [
            f"{said}. A core does {core_flops() / 1e9:.0f} billion of these a second (measured, "
            "`benchmarks/results/spectral.json`).",
            "",
            *markdown(("pair", "nodes", "workers", "time", "bound by", "without a shared folder"), rows),
            "",
            *markdown(
                (
                    "pair",
                    "worker",
                    "shortest matrix",
                    "longest matrix",
                    "workers that pay",
                    "the same, embeddings kept",
                ),
                stops,
            ),
        ]
    )


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Put the tables into the page."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page()}\n\n{END}{rest.split(END)[1]}", "utf-8")
    print(f"Wrote {PAGE}")


if __name__ == "__main__":
    main()
