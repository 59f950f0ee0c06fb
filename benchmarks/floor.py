"""Time of an edit over its counted floor: operations and bytes, at this machine's own measured rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import common
import torch
from cases import LAYER_MATRICES, LAYERS, check, counted, moved_bytes, pair
from common import Table, in_turn
from scipy.linalg import blas

from mergekit_monosoup.spectral import EditRecord, edit_weight

INPUTS = [("gaussian", torch.bfloat16), ("gaussian", torch.float32), ("tuned", torch.bfloat16)]
SIDE = 2048
COPIED = 1 << 26
REPEATS = 25


def main() -> None:
    """Time edits and yardsticks in turn, then divide."""
    options = common.arguments(__doc__ or "").parse_args()
    yardsticks = _Yardsticks(options.quick)
    edits = {case: _edits(*case, yardsticks, options.quick) for case in INPUTS}
    rates = yardsticks.rates()
    side = yardsticks.side
    measured = Table(
        "rates of this machine, best of all runs, taken in turn with the edits", ("library", "what", "rate")
    )
    measured.add("torch", f"float32 product {side}^3", f"{rates['torch'] / 1e9:.0f} GFLOP/s")
    measured.add("scipy", f"float32 product {side}^3", f"{rates['scipy'] / 1e9:.0f} GFLOP/s")
    measured.add("torch", "copy, bytes read and written", f"{rates['copy'] / 1e9:.1f} GB/s")
    tables, figures = [measured], {}
    for (kind, dtype), found in edits.items():
        table, ratio = _table(kind, dtype, found, rates)
        tables.append(table)
        figures[f"time over floor, {kind} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"] = ratio
    common.report("floor", options, tables, figures, {"rates": rates})


class _Yardsticks:
    """Float32 products of both libraries and a copy, timed whenever an edit is."""

    def __init__(self, quick: bool) -> None:
        self.side = SIDE // (4 if quick else 1)
        a, b = torch.randn(self.side, self.side), torch.randn(self.side, self.side)
        out = torch.empty_like(a)
        # Both operands in the order that each library reads without copying.
        left, right = a.numpy().T, b.numpy().T
        expected = a.double() @ b.double()
        assert torch.allclose((a @ b).double(), expected, atol=1e-2)
        assert abs(blas.sgemm(1.0, right, left).T - expected.numpy()).max() < 1e-2
        source = torch.randn(COPIED // (8 if quick else 1))
        target = torch.zeros_like(source)
        self._bytes = 2 * source.numel() * source.element_size()
        # torch's idle threads spin for some milliseconds into what comes next: the edits come after scipy.
        self.functions: dict[str, Callable[[], object]] = {
            "torch": lambda: torch.mm(a, b, out=out),
            "copy": lambda: target.copy_(source),
            "scipy": lambda: blas.sgemm(1.0, right, left),
        }
        self._best = dict.fromkeys(self.functions, float("inf"))

    def take(self, best: dict[str, float]) -> None:
        """Keep the shortest times."""
        self._best = {name: min(time, best[name]) for name, time in self._best.items()}

    def rates(self) -> dict[str, float]:
        """Return operations a second of the products and bytes a second of the copy."""
        work = {"torch": 2 * self.side**3, "scipy": 2 * self.side**3, "copy": self._bytes}
        return {name: work[name] / time for name, time in self._best.items()}


@dataclass(frozen=True)
class _Edit:
    name: str
    count: int
    rows: int
    columns: int
    seconds: float
    record: EditRecord


def _edits(kind: str, dtype: torch.dtype, yardsticks: _Yardsticks, quick: bool) -> list[_Edit]:
    found = []
    for seed, (name, (shape, count)) in enumerate(LAYER_MATRICES.items()):
        rows, columns = (side // (2 if quick else 1) for side in shape)
        base, tuned = pair(kind, rows, columns, dtype, seed)
        result, record = edit_weight(base, [tuned])
        check(result, record, base, tuned)

        def edit(base: torch.Tensor = base, tuned: torch.Tensor = tuned) -> None:
            edit_weight(base, [tuned])

        best = in_turn({"edit": edit, **yardsticks.functions}, 2 if quick else REPEATS)
        yardsticks.take(best)
        found.append(_Edit(name, count, rows, columns, best["edit"], record))
    return found


def _table(kind: str, dtype: torch.dtype, found: list[_Edit], rates: dict[str, float]) -> tuple[Table, float]:
    columns = (
        "matrix",
        "shape",
        "edit ms",
        "floor ms",
        "Gram",
        "eigen",
        "project",
        "bytes",
        "over floor",
        "backend",
    )
    note = (
        "floor in milliseconds: m n^2 + 9 n^3 + 4 m n c operations (half Gram matrix, eigen-decomposition, "
        "projection on the smaller side c of the split) at the faster library's rate, inputs read twice and "
        "the result written once at the copy's rate, none of it overlapping"
    )
    table = Table(f"{kind} update, {dtype}".replace("torch.", ""), columns, note=note)
    fastest = max(rates["torch"], rates["scipy"])
    edits = floors = 0.0
    for edit in found:
        operations = counted(edit.rows, edit.columns, edit.record.k)
        steps = {step: count / fastest for step, count in operations.items()}
        traffic = moved_bytes(edit.rows, edit.columns, dtype) / rates["copy"]
        floor = sum(steps.values()) + traffic
        edits, floors = edits + edit.count * edit.seconds, floors + edit.count * floor
        table.add(
            edit.name,
            f"{edit.rows} x {edit.columns}",
            1e3 * edit.seconds,
            1e3 * floor,
            *(1e3 * steps[step] for step in ("gram", "eigen", "project")),
            1e3 * traffic,
            edit.seconds / floor,
            edit.record.matrices[0].backend,
        )
    total = [1e3 * LAYERS * edits, 1e3 * LAYERS * floors]
    table.add(f"all of {LAYERS} layers", "", *total, "", "", "", "", edits / floors, "")
    return table, edits / floors


if __name__ == "__main__":
    main()
