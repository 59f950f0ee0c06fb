"""Time of an edit over its counted floor: operations and bytes, at this machine's own measured rates."""

from __future__ import annotations

import common
import torch
from cases import LAYER_MATRICES, LAYERS, check, counted, moved_bytes, pair
from common import Table, in_turn
from scipy.linalg import blas

from mergekit_monosoup.spectral import edit_weight

INPUTS = [("gaussian", torch.bfloat16), ("gaussian", torch.float32), ("tuned", torch.bfloat16)]
SIDE = 2048
COPIED = 1 << 26


def main() -> None:
    """Measure the rates and the edits, and divide."""
    options = common.arguments(__doc__ or "").parse_args()
    rates = _rates(options.quick)
    columns = ("library", "what", "rate")
    measured = Table("rates of this machine, best of several runs", columns)
    measured.add("torch", f"float32 product {SIDE}^3", f"{rates['torch'] / 1e9:.0f} GFLOP/s")
    measured.add("scipy", f"float32 product {SIDE}^3", f"{rates['scipy'] / 1e9:.0f} GFLOP/s")
    measured.add("torch", "copy, bytes read and written", f"{rates['copy'] / 1e9:.1f} GB/s")
    tables, figures = [measured], {}
    for kind, dtype in INPUTS:
        table, ratio = _layer(kind, dtype, rates, options.quick)
        tables.append(table)
        figures[f"time over floor, {kind} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"] = ratio
    common.report("floor", options, tables, figures, {"rates": rates})


def _rates(quick: bool) -> dict[str, float]:
    """Return operations a second of both libraries' float32 products, and bytes a second of a copy."""
    side = SIDE // (4 if quick else 1)
    a, b = torch.randn(side, side), torch.randn(side, side)
    out = torch.empty(side, side)
    # Both operands in the order that each library reads without copying.
    left, right = a.numpy().T, b.numpy().T
    expected = a.double() @ b.double()
    assert torch.allclose((a @ b).double(), expected, atol=1e-2)
    assert abs(blas.sgemm(1.0, right, left).T - expected.numpy()).max() < 1e-2
    source = torch.randn(COPIED // (8 if quick else 1))
    target = torch.zeros_like(source)
    best = in_turn(
        {
            "torch": lambda: torch.mm(a, b, out=out),
            "scipy": lambda: blas.sgemm(1.0, right, left),
            "copy": lambda: target.copy_(source),
        },
        8,
    )
    operations = 2 * side**3
    return {
        "torch": operations / best["torch"],
        "scipy": operations / best["scipy"],
        "copy": 2 * source.numel() * source.element_size() / best["copy"],
    }


def _layer(kind: str, dtype: torch.dtype, rates: dict[str, float], quick: bool) -> tuple[Table, float]:
    columns = ("matrix", "shape", "edit ms", "floor ms", "Gram", "eigen", "project", "bytes", "over floor", "backend")
    note = (
        "floor in milliseconds: m n^2 + 9 n^3 + 4 m n c operations (Gram matrix by half, eigen-decomposition, "
        "projection on the smaller side c of the split) at the faster library's rate, inputs read twice and "
        "the result written once at the copy's rate, none of it overlapping"
    )
    table = Table(f"{kind} update, {dtype}".replace("torch.", ""), columns, note=note)
    fastest = max(rates["torch"], rates["scipy"])
    edits = floors = 0.0
    for seed, (name, (shape, count)) in enumerate(LAYER_MATRICES.items()):
        rows, width = (side // (2 if quick else 1) for side in shape)
        base, tuned = pair(kind, rows, width, dtype, seed)
        result, record = edit_weight(base, [tuned])
        check(result, record, base, tuned)
        best = in_turn({"edit": lambda base=base, tuned=tuned: edit_weight(base, [tuned])}, 2 if quick else 6)["edit"]
        steps = {step: operations / fastest for step, operations in counted(rows, width, record.k).items()}
        traffic = moved_bytes(rows, width, dtype) / rates["copy"]
        floor = sum(steps.values()) + traffic
        edits, floors = edits + count * best, floors + count * floor
        table.add(
            name,
            f"{rows} x {width}",
            1e3 * best,
            1e3 * floor,
            *(1e3 * steps[step] for step in ("gram", "eigen", "project")),
            1e3 * traffic,
            best / floor,
            record.matrices[0].backend,
        )
    total = [1e3 * LAYERS * edits, 1e3 * LAYERS * floors]
    table.add(f"all of {LAYERS} layers", "", *total, "", "", "", "", edits / floors, "")
    return table, edits / floors


if __name__ == "__main__":
    main()
