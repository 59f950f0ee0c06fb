"""What all benchmarks share: options, repeats in turn, child processes, tables, the machine.

Imports nothing heavy: on Linux a child's peak memory starts from that of the process that started it,
so a benchmark that measures children must stay small itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mergekit-monosoup", "mergekit", "torch", "scipy", "numpy", "safetensors", "transformers")
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


@dataclass
class Table:
    """A printed table: numbers are shown with three digits, text as it is."""

    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: Any) -> None:
        """Append a row."""
        self.rows.append(list(cells))

    def __str__(self) -> str:
        cells = [list(self.columns), *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
        ]
        return "\n".join(["", self.title, *lines, *([self.note] if self.note else [])])


def shown(cell: Any) -> str:
    """Return a cell as text."""
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"
    return "-" if cell is None else str(cell)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes: a check that it runs, no result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return parser


def in_turn(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the shortest time of each function in seconds, all of them run in turn `repeats` times.

    Whatever else the machine does meanwhile then meets all of them, and the minimum leaves most of
    it out.
    """
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


@dataclass(frozen=True)
class Run:
    """A finished child process: wall-clock seconds, peak resident bytes, standard output."""

    seconds: float
    peak: int
    output: str


# The largest memory of a process counts what it was forked from: here a small one, whatever this one holds.
_LAUNCH = """
import json, resource, subprocess, sys, time
begin = time.perf_counter()
status = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - begin
with open(sys.argv[1], "w") as file:
    json.dump([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss], file)
sys.exit(status)
"""


def run_child(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end, offline.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **(environment or {})}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as measured:
        launched = [sys.executable, "-S", "-c", _LAUNCH, measured.name, *(str(part) for part in command)]
        done = subprocess.run(
            launched,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command} -> {done.returncode}\n{done.stdout}")
        seconds, peak = json.loads(measured.read())
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, peak * unit, done.stdout)


def report(
    name: str,
    options: argparse.Namespace,
    tables: Sequence[Table],
    figures: Mapping[str, float],
    details: Mapping[str, Any] | None = None,
) -> None:
    """Print the tables and the figures, and write them to the JSON file that was asked for."""
    described = machine()
    print("\n".join(f"{key}: {value}" for key, value in described.items()))
    for table in tables:
        print(table)
    print()
    for figure, value in figures.items():
        print(f"{figure}: {shown(value)}")
    if options.json:
        result = {
            "benchmark": name,
            "quick": options.quick,
            "machine": described,
            "figures": dict(figures),
            "tables": [asdict(table) for table in tables],
            "details": dict(details or {}),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    """Return a description of the machine and of the libraries that do the work."""
    described = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load (1 min)": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }
    # In a process of its own: the libraries are large.
    libraries = run_child([sys.executable, Path(__file__)]).output.strip().splitlines()[-1]
    return {**described, **json.loads(libraries)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(from source)"


def _libraries() -> dict[str, str]:
    """Return which libraries compute matrix products for torch and scipy, and by how many threads."""
    import scipy
    import torch

    config = torch.__config__.show()
    torch_blas = next((part[5:] for part in config.replace(",", "\n").split() if part[:5] == "BLAS_"), "")
    mkl = next((line.strip(" -") for line in config.splitlines() if "Math Kernel" in line), "")
    blas = scipy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    threads = {name: os.environ[name] for name in os.environ if name.endswith("_NUM_THREADS")}
    return {
        "torch": f"{mkl or torch_blas}; {torch.get_num_threads()} threads; "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device used"),
        "scipy": f"{blas.get('name')} {blas.get('version')}; {_scipy_threads()} threads",
        "thread variables": json.dumps(threads) if threads else "none set",
    }


def _scipy_threads() -> str:
    try:
        import scipy.linalg  # noqa: F401 - loads the library that is asked
        from threadpoolctl import threadpool_info
    except ImportError:
        return os.environ.get("OPENBLAS_NUM_THREADS", "as many as cores")
    counts = [pool["num_threads"] for pool in threadpool_info() if "scipy.libs" in pool["filepath"]]
    return str(counts[0]) if counts else "unknown"


if __name__ == "__main__":
    print(json.dumps(_libraries()))
