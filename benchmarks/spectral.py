"""Speed-up of one edit over the authors' algorithm, a full thin SVD, for the matrices of Qwen3-0.6B."""

from __future__ import annotations

from typing import Any

import common
import torch
from cases import EMBEDDING, KINDS, LAYER_MATRICES, LAYERS, check, full_svd, pair
from common import Table, in_turn, shown
from torch import Tensor

from mergekit_monosoup.spectral import EditRecord, edit_weight, spectrum

INPUTS = [
    ("gaussian", torch.bfloat16),
    ("tuned", torch.bfloat16),
    ("gaussian", torch.float32),
    ("power", torch.float32),
    ("lora", torch.float32),
    ("spiked", torch.bfloat16),
    ("spiked", torch.float32),
]
# Attention heads, bases of adapters, SmolLM2's 576.
SMALL = ((128, 128), (256, 256), (512, 512), (576, 576), (1536, 576))
SMALL_INPUTS = [("tuned", torch.bfloat16), ("tuned", torch.float32), ("spiked", torch.bfloat16)]
# A thin SVD of all 151,936 rows takes some seven float32 copies of 622 MB; its time per row does not
# depend on the number of rows once they are many times the columns.
SVD_ROWS = 16_384
NOTE = "times in milliseconds, shortest of several runs in turn; k and backend as the edit reports them"


def main() -> None:
    """Check, time and report."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--no-embedding", action="store_true", help="leave the embedding out")
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    divisor = 2 if options.quick else 1
    tables, figures = [], {}
    for kind, dtype in INPUTS:
        name = f"{kind} {_short(dtype)}"
        table, figures[f"speed-up, {name}"] = _layer(kind, dtype, divisor, repeats)
        tables.append(table)
        print(f"{name}: {shown(figures[f'speed-up, {name}'])}", flush=True)
    figures["speed-up, least"] = min(figures.values())
    table, small = _small(repeats)
    tables.append(table)
    figures |= small
    figures["second passes, share of edits"] = _PASSES.repeated / _PASSES.edits
    if not options.no_embedding:
        table, figures["speed-up, embedding"] = _embedding(options.quick)
        tables.append(table)
    details = {"kinds": KINDS, "repeats": repeats, "sizes divided by": divisor}
    common.report("spectral", options, tables, figures, details)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _compared(base: Tensor, tuned: Tensor, repeats: int) -> tuple[EditRecord, dict[str, float]]:
    """Check an edit, then time it and the full SVD in turn."""
    with _PASSES:
        result, record = edit_weight(base, [tuned])
    check(result, record, base, tuned)
    ways = {
        "svd": lambda: full_svd(base, tuned).weight.to(base.dtype),
        "edit": lambda: edit_weight(base, [tuned]),
    }
    return record, in_turn(ways, repeats)


def _layer(kind: str, dtype: torch.dtype, divisor: int, repeats: int) -> tuple[Table, float]:
    columns = ("matrix", "shape", "in a layer", "full SVD", "edit", "ratio", "k", "backend")
    table = Table(f"{kind} update in {_short(dtype)}: {KINDS[kind]}", columns, note=NOTE)
    svd_total = edit_total = 0.0
    for seed, (name, (shape, count)) in enumerate(LAYER_MATRICES.items()):
        rows, width = (side // divisor for side in shape)
        base, tuned = pair(kind, rows, width, dtype, seed)
        record, best = _compared(base, tuned, repeats)
        svd_total += count * best["svd"]
        edit_total += count * best["edit"]
        table.add(
            name,
            f"{rows} x {width}",
            count,
            1e3 * best["svd"],
            1e3 * best["edit"],
            best["svd"] / best["edit"],
            int(record.k),
            record.matrices[0].backend,
        )
    ratio = svd_total / edit_total
    table.add(
        f"all of {LAYERS} layers", "", "", LAYERS * 1e3 * svd_total, LAYERS * 1e3 * edit_total, ratio, "", ""
    )
    return table, ratio


def _small(repeats: int) -> tuple[Table, dict[str, float]]:
    columns = ("shape", "update", "full SVD", "edit", "ratio", "k", "backend")
    table = Table("small sides", columns, note=NOTE)
    ratios = {}
    for rows, width in SMALL:
        for kind, dtype in SMALL_INPUTS:
            base, tuned = pair(kind, rows, width, dtype)
            record, best = _compared(base, tuned, 3 * repeats)
            ratios[rows, width, kind, dtype] = best["svd"] / best["edit"]
            table.add(
                f"{rows} x {width}",
                f"{kind} {_short(dtype)}",
                1e3 * best["svd"],
                1e3 * best["edit"],
                best["svd"] / best["edit"],
                int(record.k),
                record.matrices[0].backend,
            )
    wide = [ratio for (_, width, *_), ratio in ratios.items() if width >= 512]
    return table, {"speed-up, sides of 512 to 576, least": min(wide)}


class _Passes:
    """Counts edits that decompose more than one Gram matrix of the whole update."""

    def __init__(self) -> None:
        self.edits = self.repeated = 0
        self._calls = 0

    def __enter__(self) -> None:
        self._calls = 0
        self._original = spectrum.gram_decomposition
        spectrum.gram_decomposition = self._counted

    def __exit__(self, *_: object) -> None:
        spectrum.gram_decomposition = self._original
        self.edits += 1
        self.repeated += self._calls > 1

    def _counted(self, *arguments: Any) -> Any:
        self._calls += 1
        return self._original(*arguments)


_PASSES = _Passes()


def _embedding(quick: bool) -> tuple[Table, float]:
    columns = ("embedding", "shape", "full SVD", "edit", "ratio", "k", "backend")
    note = (
        "times in milliseconds. The SVD is timed at fewer rows: at all of them it needs some seven "
        "float32 copies of 622 MB, and its time per row no longer changes. At full size, k and "
        "lambda_low are checked against a float64 Gram matrix."
    )
    table = Table("embedding, tuned update in bf16", columns, note=note)
    width = EMBEDDING[1] // (4 if quick else 1)
    rows = SVD_ROWS // (8 if quick else 1)
    base, tuned = pair("tuned", rows, width, torch.bfloat16)
    result, record = edit_weight(base, [tuned])
    check(result, record, base, tuned)
    best = in_turn(
        {
            "svd": lambda: full_svd(base, tuned).weight.to(base.dtype),
            "edit": lambda: edit_weight(base, [tuned]),
        },
        2,
    )
    ratio = best["svd"] / best["edit"]
    backend = record.matrices[0].backend
    table.add(
        "fewer rows",
        f"{rows} x {width}",
        1e3 * best["svd"],
        1e3 * best["edit"],
        ratio,
        int(record.k),
        backend,
    )
    rows = EMBEDDING[0] // (16 if quick else 1)
    base, tuned = pair("tuned", rows, width, torch.bfloat16)
    untouched = torch.rand(rows, generator=torch.Generator().manual_seed(1)) > 0.05
    for name in ("all rows", "5 % of rows touched"):
        if name != "all rows":
            tuned[untouched] = base[untouched]
        result, record = edit_weight(base, [tuned])
        _check_by_gram(record, base, tuned)
        assert name == "all rows" or torch.equal(result[untouched], base[untouched])
        best = in_turn({"edit": lambda: edit_weight(base, [tuned])}, 2)
        backend = record.matrices[0].backend
        table.add(name, f"{rows} x {width}", None, 1e3 * best["edit"], None, int(record.k), backend)
    return table, ratio


def _check_by_gram(record: object, base: torch.Tensor, tuned: torch.Tensor) -> None:
    """Check k and lambda_low where a float64 SVD is out of reach."""
    gram = torch.zeros(base.shape[1], base.shape[1], dtype=torch.float64)
    for start in range(0, len(base), 8192):
        dw = tuned[start : start + 8192].double() - base[start : start + 8192].double()
        gram.addmm_(dw.T, dw)
    s = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    exact = full_svd(torch.zeros(len(s), len(s), dtype=torch.float64), torch.diag(s), torch.float64)
    assert record.k == exact.k, f"k is {record.k}, not {exact.k}"
    assert abs(record.lambda_low - exact.lambda_low) <= 1e-4


if __name__ == "__main__":
    main()
