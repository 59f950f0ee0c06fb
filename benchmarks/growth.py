"""How the time of an edit grows with the size of a matrix, and that of a merge with the number of layers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
from common import Table, in_turn, shown
from merging import merge, recipe, verify, write_checkpoints

SIZES = (256, 512, 1024, 2048, 4096)
QUICK_SIZES = (128, 256, 512)
LAYERS = (1, 2, 4, 8)
QUICK_LAYERS = (1, 2)
VOCABULARY = 1536
# Beyond it, a float64 SVD takes minutes: k and lambda_low come from a float64 eigen-decomposition.
LARGEST_SVD = 2048


def main() -> None:
    """Measure layers first, while this process is small, then matrices."""
    options = common.arguments(__doc__ or "").parse_args()
    layers, by_layer = _layers(options.quick)
    sizes, by_size = _sizes(options.quick)
    common.report("growth", options, [sizes, layers], {**by_size, **by_layer})


def _layers(quick: bool) -> tuple[Table, dict[str, float]]:
    counts = QUICK_LAYERS if quick else LAYERS
    columns = ("layers", "linear s", "monosoup s", "monosoup peak MiB")
    note = "whole processes, layers of Qwen3-0.6B's shape, a small vocabulary; shortest of two runs in turn"
    table = Table("growth with the number of layers", columns, note=note)
    times: dict[str, list[float]] = {"linear": [], "monosoup": []}
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as name:
        for count in counts:
            folder = Path(name) / str(count)
            write_checkpoints(folder, count, VOCABULARY)
            if count == counts[0]:
                out = folder / "checked"
                merge(folder, recipe(folder, "monosoup"), keep=out)
                verify(folder, out, "monosoup", VOCABULARY * 1024)
            runs: dict[str, list[common.Run]] = {"linear": [], "monosoup": []}
            for _ in range(1 if quick else 2):
                for method, found in runs.items():
                    found.append(merge(folder, recipe(folder, method)))
            for method, found in runs.items():
                times[method].append(min(run.seconds for run in found))
            peak = max(run.peak for run in runs["monosoup"])
            table.add(count, times["linear"][-1], times["monosoup"][-1], peak / 2**20)
            print(f"{count} layers: {shown(times['monosoup'][-1])} s", flush=True)
    slope, start = _line(counts, times["monosoup"])
    plain, _ = _line(counts, times["linear"])
    return table, {
        "seconds a layer, monosoup": slope,
        "seconds a layer, linear": plain,
        "seconds without layers, monosoup": start,
    }


def _line(x: tuple[int, ...], y: list[float]) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
    return slope, mean_y - slope * mean_x


def _sizes(quick: bool) -> tuple[Table, dict[str, float]]:
    import torch
    from cases import check, counted, full_svd, pair

    from mergekit_monosoup.spectral import edit_weight

    columns = ("n x n", "edit ms", "full SVD ms", "ratio", "GFLOP counted", "GFLOP/s", "k", "backend")
    note = (
        "gaussian update in bf16; shortest of several runs in turn; counted: n^3 for the Gram matrix, 9 n^3 "
        "for the eigen-decomposition, 4 n^2 c for the projection"
    )
    table = Table("growth with the size of the matrix", columns, note=note)
    rates, times = {}, {}
    sizes = QUICK_SIZES if quick else SIZES
    for n in sizes:
        base, tuned = pair("gaussian", n, n, torch.bfloat16)
        result, record = edit_weight(base, [tuned])
        with_svd = n <= LARGEST_SVD
        if with_svd:
            check(result, record, base, tuned)
        else:
            _check_by_eigen(result, record, base, tuned)

        def edit(base: torch.Tensor = base, tuned: torch.Tensor = tuned) -> None:
            edit_weight(base, [tuned])

        def svd(base: torch.Tensor = base, tuned: torch.Tensor = tuned) -> None:
            full_svd(base, tuned)

        repeats = 2 if n > 1024 else 5
        best = in_turn({"edit": edit, **({"svd": svd} if with_svd else {})}, repeats)
        operations = sum(counted(n, n, record.k).values())
        rates[n], times[n] = operations / best["edit"], best["edit"]
        slow = best.get("svd")
        table.add(
            n,
            1e3 * best["edit"],
            slow and 1e3 * slow,
            slow and slow / best["edit"],
            operations / 1e9,
            rates[n] / 1e9,
            int(record.k),
            record.matrices[0].backend,
        )
        print(f"{n}: {shown(1e3 * best['edit'])} ms", flush=True)
    first, last = sizes[-2], sizes[-1]
    return table, {
        f"time {last} over {first} (8 for n^3)": times[last] / times[first],
        f"rate at {last} over {first}": rates[last] / rates[first],
    }


def _check_by_eigen(result: Any, record: Any, base: Any, tuned: Any) -> None:
    """Compare with a float64 eigen-decomposition of dW^T dW; a gaussian update has no value near zero."""
    import torch
    from cases import COEFFICIENT_TOLERANCE, WEIGHT_TOLERANCE, half_spacing

    dw = tuned.double() - base.double()
    squares, vectors = torch.linalg.eigh(dw.T @ dw)
    s = squares.flip(0).clamp(min=0).sqrt()
    p = s / s.sum()
    k = int(torch.ceil((-torch.special.xlogy(p, p).sum()).exp()))
    lambda_low = float((s[k] / s[0]) ** 2)
    lambda_low += (1 - lambda_low) * float((s[k:].square().sum() / s.square().sum()).sqrt())
    assert record.k == k, f"k is {record.k}, not {k}"
    assert abs(record.lambda_low - lambda_low) <= COEFFICIENT_TOLERANCE
    low = vectors[:, : len(s) - k]
    exact = base.double() + (1 - lambda_low) * dw + (2 * lambda_low - 1) * ((dw @ low) @ low.T)
    error = (result.double() - exact).abs() - half_spacing(exact, result.dtype)
    assert float(error.max()) <= WEIGHT_TOLERANCE * float(dw.abs().max())


if __name__ == "__main__":
    main()
