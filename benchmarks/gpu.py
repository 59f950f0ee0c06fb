"""What an NVIDIA card does with an edit: tests, decompositions, edits, whole merges, layers of a 14B model.

One command on a bare machine that has torch and transformers, under eight minutes on an H100:

    python benchmarks/gpu_wheels.py FOLDER            # where there is a network
    python benchmarks/gpu.py --wheels FOLDER --json benchmarks/results/gpu.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import ROOT, Table

TESTS = ("tests/test_gpu.py", "tests/test_gpu_merges.py", "tests/test_state_dicts.py::test_on_a_gpu")
# Qwen3-14B: the matrices of one of its layers, and embedding and head.
LAYERS = 40
LAYER = [(5120, 5120), (1024, 5120), (1024, 5120), (5120, 5120), (17408, 5120), (17408, 5120), (5120, 17408)]
OUTER = [(151_936, 5120), (151_936, 5120)]
PAPER_SECONDS = 83.3
SIDES = (1024, 2048, 3072, 4096, 5120, 8192)
WIDEST_SVD = 4096
PARTS = ("tests", "rates", "decompositions", "edits", "model", "merges")


def main() -> None:
    """Install what is missing, then run each part and report."""
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages to install beside torch")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--folder", type=Path, help="where checkpoints go, 5 GB; default: temporary")
    options = parser.parse_args()
    if options.wheels is not None:
        _again_with(options.wheels)
    parts = _Parts(options)
    try:
        for part in options.parts:
            started = time.perf_counter()
            getattr(parts, part)()
            print(f"[{part}: {time.perf_counter() - started:.0f} s]", flush=True)
    finally:
        # A part that fails takes no figures of the others with it.
        common.report("gpu", options, parts.tables, parts.figures, parts.details)


def _again_with(wheels: Path) -> None:
    """Run this command again with the wheels installed into a folder of their own."""
    site = tempfile.mkdtemp(prefix="site-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site]
    subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    path = os.pathsep.join(filter(None, (site, str(ROOT), os.environ.get("PYTHONPATH"))))
    arguments = [a for i, a in enumerate(sys.argv) if "--wheels" not in (a, sys.argv[i - 1])]
    os.environ["PYTHONPATH"] = path
    os.execv(sys.executable, [sys.executable, *arguments])


class _Parts:
    def __init__(self, options: Any) -> None:
        import torch

        self._torch = torch
        self._options = options
        self._device = torch.device("cuda")
        self.tables: list[Table] = []
        self.figures: dict[str, float] = {}
        self.details: dict[str, Any] = {"card": torch.cuda.get_device_name()}

    def _table(self, *arguments: Any, **more: Any) -> Table:
        self.tables.append(Table(*arguments, **more))
        return self.tables[-1]

    def _seconds(self, function: Callable[[], object], repeats: int = 2) -> float:
        """Return the shortest time of some runs, the first one left out."""
        best = float("inf")
        for turn in range(repeats + 1):
            self._torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            self._torch.cuda.synchronize()
            if turn:
                best = min(best, time.perf_counter() - start)
        return best

    def tests(self) -> None:
        """Run the tests that need a card."""
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        self.details["tests"] = done.stdout.strip().splitlines()[-1]
        print(done.stdout[-5000:] if done.returncode else self.details["tests"], flush=True)

    def rates(self) -> None:
        """Measure products of each precision and copies between host and card."""
        torch = self._torch
        table = self._table("rates of the card, products of 8192 x 8192", ("what", "rate"))
        n = 2048 if self._options.quick else 8192
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            a = torch.randn(n, n, device=self._device).to(dtype)
            rate = 2 * n**3 / self._seconds(lambda a=a: a @ a)  # type: ignore[misc]
            table.add(str(dtype).removeprefix("torch."), f"{rate / 1e12:.1f} TFLOP/s")
            self.figures[f"TFLOP/s, {dtype}".replace("torch.", "")] = rate / 1e12
        host = torch.randn(1 << 27)
        for name, tensor in (("pageable", host), ("pinned", host.pin_memory())):
            there = tensor.to(self._device)
            for way, function in (
                ("to the card", lambda t=tensor: t.to(self._device)),
                ("from the card", lambda t=tensor, s=there: t.copy_(s)),
            ):
                table.add(
                    f"{name} memory {way}", f"{4 * host.numel() / self._seconds(function) / 1e9:.1f} GB/s"
                )

    def decompositions(self) -> None:
        """Time what could find the split: whole decompositions, values alone, projectors from products."""
        torch = self._torch
        ways = {
            "eigh float64": lambda g, f: torch.linalg.eigh(g),
            "eigh float32": lambda g, f: torch.linalg.eigh(f),
            "eigh float32, refined": lambda g, f: _refined(g, *torch.linalg.eigh(f)),
            "values float64": lambda g, f: torch.linalg.eigvalsh(g),
            "product float64": lambda g, f: g @ g,
        }
        columns = ("side", *ways, "of two streams", "of four streams", "projector", "products")
        note = (
            "milliseconds for a Gram matrix as fine-tuning leaves it; of two and four streams: float64 eigh "
            "of as many matrices at a time, for each; refined: one step in float64 after float32; projector: "
            "of the leading third, by eigenvalues alone and Newton and Schulz's iteration in float64, with "
            "its number of products"
        )
        table = self._table("decompositions", columns, note=note)
        for n in SIDES[:2] if self._options.quick else SIDES:
            gram = self._gram(n)
            single = gram.float()
            repeats = 1 if n > WIDEST_SVD else 2
            times = [1e3 * self._seconds(partial(way, gram, single), repeats) for way in ways.values()]
            streams = [1e3 * self._in_streams(gram, count) for count in (2, 4)]
            products, error = _projector(gram)
            projector = 1e3 * self._seconds(partial(_projector, gram), 1)
            table.add(n, *times, *streams, projector, products)
            if error is not None:
                self.details[f"error of the projector, {n}"] = error
            exact, values = torch.linalg.eigh(gram)[0], _refined(gram, *torch.linalg.eigh(single))[0]
            relative = (values.sort()[0] - exact).abs().max() / exact[-1]
            self.details[f"largest error of refined values over the largest value, {n}"] = float(relative)

    def _gram(self, n: int) -> Any:
        torch = self._torch
        i = torch.arange(1.0, n + 1, device=self._device)
        factor = torch.randn(2 * n, n, device=self._device) * i**-0.5 * torch.where(i <= 16, 4.0, 1.0)
        factor = (factor @ torch.randn(n, n, device=self._device)).double() / n
        return factor.T @ factor

    def _in_streams(self, gram: Any, count: int) -> float:
        matrices = [gram.clone() for _ in range(count)]
        jobs = [lambda m=m: self._torch.linalg.eigh(m) for m in matrices]
        return self._seconds(lambda: self._in_lanes(jobs, count), 1) / count

    def _in_lanes(self, jobs: list[Callable[[], object]], count: int | None = None) -> None:
        """Do what a merge does with its units: each lane takes the next one."""
        from concurrent.futures import ThreadPoolExecutor

        from mergekit.options import MergeOptions

        from mergekit_monosoup.merging.lanes import Lane, lanes
        from mergekit_monosoup.merging.room import Room

        places = lanes(MergeOptions(device="cuda"))
        if count is not None:
            room = Room(1 << 60)
            places = [Lane(self._device, room) for _ in range(count)]
        waiting = iter(jobs)

        def work(lane: Any) -> None:
            while (job := next(waiting, None)) is not None:
                with lane.taken(0, ()):
                    job()

        with ThreadPoolExecutor(len(places)) as pool:
            for done in [pool.submit(work, lane) for lane in places]:
                done.result()

    def edits(self) -> None:
        """Compare edits with the authors' algorithm on the card, a full thin SVD in float32."""
        torch = self._torch
        from cases import KINDS, check, full_svd, pair

        from mergekit_monosoup.spectral import edit_weight

        columns = ("shape", "kind", "full SVD", "edit", "ratio", "k", "backend")
        table = self._table("edits in bf16 and float32, milliseconds", columns)
        shapes = [(3072, 1024), (1024, 1024)] if self._options.quick else [(3072, 1024), (4096, 4096)]
        for shape in shapes:
            kinds = [*((k, torch.bfloat16) for k in KINDS), ("tuned", torch.float32), ("lora", torch.float32)]
            for kind, dtype in kinds if shape == shapes[0] else kinds[1:2]:
                base, tuned = (t.to(self._device) for t in pair(kind, *shape, dtype))
                result, record = edit_weight(base, [tuned])
                check(result, record, base, tuned)
                svd = self._seconds(partial(full_svd, base, tuned), 1)
                edit = self._seconds(partial(edit_weight, base, [tuned]), 3)
                name = f"{kind} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
                backend = record.matrices[0].backend
                table.add(
                    f"{shape[0]} x {shape[1]}",
                    name,
                    1e3 * svd,
                    1e3 * edit,
                    svd / edit,
                    int(record.k),
                    backend,
                )
                self.figures[f"speed-up on the card, {shape[0]} x {shape[1]}, {name}"] = svd / edit

    def model(self) -> None:
        """Edit the matrices of a layer of Qwen3-14B, embedding and head; extrapolate to the model."""
        torch = self._torch
        from mergekit_monosoup.spectral import edit_weight

        divisor = 8 if self._options.quick else 1
        layer, outer = ([(r // divisor, c // divisor) for r, c in shapes] for shapes in (LAYER, OUTER))
        columns = ("shape", "edit ms", "k", "backend", "memory over the inputs, GB")
        table = self._table("matrices of Qwen3-14B, tuned update in bf16, one at a time", columns)
        pairs = {}
        for rows, width in dict.fromkeys([*layer, *outer]):
            base, tuned = pairs[rows, width] = self._pair(rows, width)
            _, record = edit_weight(base, [tuned])
            self._check_k(record, base, tuned)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = self._seconds(partial(edit_weight, base, [tuned]), 1)
            peak = (torch.cuda.max_memory_allocated() - before) / 1e9
            table.add(f"{rows} x {width}", 1e3 * seconds, int(record.k), record.matrices[0].backend, peak)

        def job(shape: tuple[int, int], moved: bool) -> Callable[[], object]:
            base, tuned = pairs[shape]
            if not moved:
                return lambda: edit_weight(base, [tuned])
            there, beside = base.cpu(), tuned.cpu()
            return lambda: edit_weight(there.to(self._device), [beside.to(self._device)])[0].cpu()

        for name, moved in (("arithmetic", False), ("with copies from and to the host", True)):
            jobs = {shape: job(shape, moved) for shape in pairs}
            per_layer = self._seconds(lambda jobs=jobs: self._in_lanes([jobs[s] for s in layer * 2]), 1) / 2
            rest = self._seconds(lambda jobs=jobs: self._in_lanes([jobs[s] for s in outer]), 1)
            total = LAYERS * per_layer + rest
            self.figures[f"Qwen3-14B, {name}, seconds"] = total
            self.details[f"Qwen3-14B, {name}"] = {"a layer": per_layer, "embedding and head": rest}
        self.details["Qwen3-14B in the paper, on an A100, seconds"] = PAPER_SECONDS

    def _pair(self, rows: int, columns: int) -> tuple[Any, Any]:
        torch, small = self._torch, min(rows, columns)
        base = torch.empty(rows, columns, device=self._device).normal_(std=0.02)
        i = torch.arange(1.0, small + 1, device=self._device)
        spectrum = i**-0.5 * torch.where(i <= 16, 4.0, 1.0)
        dw = torch.randn(max(rows, columns), small, device=self._device) * spectrum
        dw = dw @ torch.randn(small, small, device=self._device)
        dw = dw if rows >= columns else dw.T
        dw *= 0.01 * base.norm() / dw.norm()
        # What is merged is what is stored: the base rounded first.
        base = base.bfloat16()
        return base, dw.add_(base).bfloat16()

    def _check_k(self, record: Any, base: Any, tuned: Any) -> None:
        torch = self._torch
        from mergekit_monosoup.spectral.split import split_index

        small = min(base.shape)
        gram = torch.zeros(small, small, dtype=torch.float64, device=self._device)
        for w0, w1 in zip(base.split(8192), tuned.split(8192), strict=True):
            dw = w1.double() - w0.double()
            gram += dw.T @ dw if base.shape[0] >= base.shape[1] else 0
        if base.shape[0] < base.shape[1]:
            dw = tuned.double() - base.double()
            gram = dw @ dw.T
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt().cpu()
        assert record.k == split_index(values), f"k is {record.k}, not {split_index(values)}"

    def merges(self) -> None:
        """Run whole merges of a pair in the shape of Qwen3-0.6B, on the card and on the processor."""
        from merging import command, recipe, write_checkpoints

        columns = ("merge", "seconds", "peak of the process, MiB")
        table = self._table("whole merges in the shape of Qwen3-0.6B, processes with their start", columns)
        layers, vocabulary = (2, 4096) if self._options.quick else (28, 151_936)
        with tempfile.TemporaryDirectory(dir=self._options.folder) as name:
            folder = Path(name)
            write_checkpoints(folder, layers, vocabulary)
            ours = [sys.executable, "-m", "mergekit_monosoup", "merge"]
            imports = [sys.executable, "-c", "import torch, mergekit_monosoup.merging.run"]
            # The first one brings the files of the packages into memory.
            run = min((common.run_child(imports) for _ in range(2)), key=lambda run: run.seconds)
            table.add("imports alone", run.seconds, run.peak / 2**20)
            for label, start, method, flags in (
                ("monosoup --cuda", ours, "monosoup", ["--cuda"]),
                ("linear, mergekit-yaml", command(), "linear", []),
                ("monosoup, mergekit-yaml --cuda", command(), "monosoup", ["--cuda"]),
                ("monosoup --gpu-rich", ours, "monosoup", ["--gpu-rich"]),
                ("monosoup on the processor", ours, "monosoup", []),
            ):
                file = folder / "recipe.yml"
                file.write_text(json.dumps(recipe(folder, method)), encoding="utf-8")
                with _dropped(folder / "merged") as out:
                    try:
                        run = common.run_child([*start, file, out, "--no-copy-tokenizer", "--quiet", *flags])
                    except RuntimeError as error:
                        # The other merges are worth knowing.
                        self.details[f"{label} failed"] = str(error)[-2000:]
                        print(f"{label}: {error}", flush=True)
                        continue
                print(f"{label}: {run.seconds:.1f} s", flush=True)
                table.add(label, run.seconds, run.peak / 2**20)
                self.figures[f"{label}, seconds"] = run.seconds


@contextmanager
def _dropped(folder: Path) -> Iterator[Path]:
    import shutil

    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refined(gram: Any, values: Any, vectors: Any) -> tuple[Any, Any]:
    """Return eigenpairs of float32 after one step in float64 (Ogita & Aishima, 2018, algorithm 1)."""
    import torch

    x = vectors.double()
    r = torch.eye(len(x), dtype=x.dtype, device=x.device) - x.T @ x
    s = x.T @ gram @ x
    found = s.diagonal() / (1 - r.diagonal())
    gaps = found[None, :] - found[:, None]
    delta = 2 * ((s - torch.diag(found)).norm() + gram.norm() * r.norm())
    e = torch.where(gaps.abs() > delta, (s + found[None, :] * r) / gaps, r / 2)
    return found, x + x @ e


def _projector(gram: Any) -> tuple[int, float | None]:
    """Find the projector on the leading third from products; return their number, and its error if small."""
    import math

    import torch

    n = len(gram)
    values, vectors = torch.linalg.eigh(gram) if n <= 2048 else (torch.linalg.eigvalsh(gram), None)
    k = n // 3
    above, below = float(values[n - k]), float(values[n - k - 1])
    middle = (above + below) / 2
    reach = max(float(values[-1]) - middle, middle - float(values[0]))
    identity = torch.eye(n, dtype=gram.dtype, device=gram.device)
    x = (gram - middle * identity) / reach
    steps = math.ceil(math.log(2 * reach / (above - below)) / math.log(15 / 8)) + 3
    for _ in range(steps):
        square = x @ x
        x = x @ (1.875 * identity - 1.25 * square + 0.375 * (square @ square))
    error = None
    if vectors is not None:
        leading = vectors[:, n - k :]
        error = float(((x + identity) / 2 - leading @ leading.T).norm() / math.sqrt(k))
    return 3 * steps, error


if __name__ == "__main__":
    main()
