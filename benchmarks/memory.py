"""Scratch memory of one edit above its inputs, the returned tensor included, in float32 copies of the matrix.

Each edit runs in a fresh process; its peak resident memory is read from the operating system, so that
what NumPy, SciPy, LAPACK and torch allocate all counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

import common
from common import Table, run_child

SHAPES = {
    "k_proj, v_proj": (1024, 1024),
    "q_proj": (2048, 1024),
    "o_proj": (1024, 2048),
    "gate_proj, up_proj": (3072, 1024),
    "down_proj": (1024, 3072),
    "embedding": (151_936, 1024),
}
QUICK = ("k_proj, v_proj", "gate_proj, up_proj", "embedding")
CASES = (("gaussian", "bfloat16"), ("tuned", "bfloat16"), ("gaussian", "float32"))
# Freed memory goes back at once: none of it hides a later allocation, or stays counted.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STATUS = Path("/proc/self/status")


def main() -> None:
    """Measure in child processes and report."""
    parser = common.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, kind, dtype, rows, columns = options.child
        print(json.dumps(measured(method, kind, dtype, int(rows), int(columns))))
        return
    columns_ = ("matrix", "shape", "update", "edit", "k", "backend", "full SVD")
    note = (
        "in float32 copies of the matrix; the returned tensor is half a copy in bf16 and a whole one in "
        "fp32. Gram matrix, eigenvectors and blocks are as large for a small matrix as for a long one."
    )
    table = Table("peak memory of one edit above its inputs", columns_, note=note)
    peaks: dict[tuple[str, str], float] = {}
    shapes = {name: SHAPES[name] for name in QUICK} if options.quick else SHAPES
    for name, shape in shapes.items():
        rows, columns = (side // (4 if options.quick else 1) for side in shape)
        for kind, dtype in CASES[: 2 if options.quick else None]:
            found = child("edit", kind, dtype, rows, columns)
            yardstick = None
            if name != "embedding" and (kind, dtype) == CASES[1]:
                yardstick = child("svd", kind, dtype, rows, columns)["copies"]
            case = f"{kind} {'bf16' if dtype == 'bfloat16' else 'fp32'}"
            table.add(
                name, f"{rows} x {columns}", case, found["copies"], found["k"], found["backend"], yardstick
            )
            peaks[name, dtype] = max(peaks.get((name, dtype), 0.0), found["copies"])
    bf16 = {name: peak for (name, dtype), peak in peaks.items() if dtype == "bfloat16"}
    figures = {
        "copies, embedding": bf16["embedding"],
        "copies, largest matrix of a layer": max(
            bf16[name] for name in bf16 if "up_proj" in name or "down" in name
        ),
        "copies, smallest matrix of a layer": bf16["k_proj, v_proj"],
        "copies, full SVD at most": max(row[-1] for row in table.rows if row[-1] is not None),
    }
    common.report("memory", options, [table], figures)


def child(*case: str | int) -> dict[str, float]:
    """Measure one case in a process of its own."""
    command = [sys.executable, Path(__file__), "--child", *(str(part) for part in case)]
    result: dict[str, float] = json.loads(run_child(command, ALLOCATOR).output.splitlines()[-1])
    return result


def measured(method: str, kind: str, dtype_name: str, rows: int, columns: int) -> dict[str, object]:
    """Return the peak of one edit in this process, once its result has been checked."""
    import torch
    from cases import check, full_svd, pair

    from mergekit_monosoup.spectral import edit_weight

    dtype = getattr(torch, dtype_name)

    def run(base: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, int, str]:
        if method == "svd":
            result = full_svd(base, tuned)
            return result.weight.to(dtype), result.k, "svd"
        weight, record = edit_weight(base, [tuned])
        if rows <= 8192 and len(base) == rows:
            checks.append(record)
        return weight, int(record.k), record.matrices[0].backend

    checks: list[object] = []
    # Thread pools and buffers of the libraries belong to the process, not to an edit.
    for warm in ("gaussian", "tuned"):
        run(*pair(warm, 600, 512, dtype))
    base, tuned = pair(kind, rows, columns, dtype)
    ballast = bytearray(max(0, peak_bytes() - resident_bytes()))
    before = max(peak_bytes(), resident_bytes())
    weight, k, backend = run(base, tuned)
    copies = (peak_bytes() - before) / (4 * rows * columns)
    del ballast
    for record in checks:
        check(weight, record, base, tuned)  # type: ignore[arg-type]
    return {"copies": copies, "k": k, "backend": backend}


def peak_bytes() -> int:
    """Return the most that was ever resident."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def resident_bytes() -> int:
    """Return what is resident now; elsewhere than on Linux, the peak, which may hide a little."""
    return _status("VmRSS") or peak_bytes()


def _status(field: str) -> int:
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
