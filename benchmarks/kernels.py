"""The compiled kernels against torch's products and eigh, by shape and in whole merges."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import torch
from cases import LAYER_MATRICES, check, pair
from common import Table, in_turn
from merging import merge, recipe, write_checkpoints

from mergekit_monosoup.spectral import edit_weight
from mergekit_monosoup.spectral.kernels import VARIABLE

SIDES = (128, 256, 384, 512, 576)
CASES = (("tuned", torch.bfloat16), ("tuned", torch.float32), ("gaussian", torch.bfloat16))
LAYERS, VOCABULARY = 8, 4096


def main() -> None:
    """Compare edits, then merges, in turn."""
    options = common.arguments(__doc__ or "").parse_args()
    shapes = {f"{side} x {side}": (side, side) for side in SIDES}
    shapes |= {f"{rows} x {columns}": (rows, columns) for (rows, columns), _ in LAYER_MATRICES.values()}
    columns = ("shape", "update", "kernels", "torch", "torch over kernels", "threads sharing one", "over")
    note = (
        "milliseconds for each of two edits at a time, one to a core, as a merge does them; by the kernels, "
        "by torch alone; and by the kernels with all cores sharing one matrix after the other"
    )
    table = Table("edits, two at a time", columns, note=note)
    figures: dict[str, float] = {}
    for name, shape in shapes.items():
        for kind, dtype in CASES:
            if options.quick and max(shape) > 512:
                continue
            label = f"{kind} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
            kernels, alone, shared = (1e3 * t for t in _edits(kind, shape, dtype, 2 if options.quick else 5))
            table.add(name, label, kernels, alone, alone / kernels, shared, shared / kernels)
            figures[f"torch over kernels, {name}, {label}"] = alone / kernels
    ratio = _merges(2 if options.quick else LAYERS, options.quick)
    figures["whole merge, torch over kernels"] = ratio
    common.report("kernels", options, [table], figures, {"layers": LAYERS, "vocabulary": VOCABULARY})


def _edits(kind: str, shape: tuple[int, int], dtype: torch.dtype, repeats: int) -> tuple[float, float, float]:
    inputs = [pair(kind, *shape, dtype, seed) for seed in range(2)]
    cores = torch.get_num_threads()

    def edit(index: int) -> object:
        torch.set_num_threads(1)
        return edit_weight(inputs[index][0], [inputs[index][1]])

    def together(pool: ThreadPoolExecutor, by: str = "") -> None:
        os.environ[VARIABLE] = by
        list(pool.map(edit, range(2)))
        os.environ[VARIABLE] = ""

    def shared() -> None:
        torch.set_num_threads(cores)
        for base, tuned in inputs:
            edit_weight(base, [tuned])

    for by in ("", "torch"):
        os.environ[VARIABLE] = by
        result, record = edit_weight(inputs[0][0], [inputs[0][1]])
        check(result, record, *inputs[0])
    with ThreadPoolExecutor(2) as pool:
        ways = {"kernels": lambda: together(pool), "torch": lambda: together(pool, "torch"), "shared": shared}
        best = in_turn(ways, repeats)
    torch.set_num_threads(cores)
    return best["kernels"] / 2, best["torch"] / 2, best["shared"] / 2


def _merges(layers: int, quick: bool) -> float:
    """Return the time of a whole merge without the kernels over one with them, both above an idle command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoints(folder, layers, VOCABULARY)
        best = {}
        for _ in range(1 if quick else 3):
            for by in ("", "torch"):
                os.environ[VARIABLE] = by
                seconds = merge(folder, recipe(folder, "monosoup"), ours=True).seconds
                best[by] = min(best.get(by, seconds), seconds)
    print(f"whole merges: {best['']:.1f} s with the kernels, {best['torch']:.1f} s without", flush=True)
    return best["torch"] / best[""]


if __name__ == "__main__":
    main()
