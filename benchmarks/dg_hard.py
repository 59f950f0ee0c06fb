"""Speed-up of `dg_hard` and `monosoup` over a full thin SVD, and the cost of rounding, by kind of update.

Run `python benchmarks/dg_hard.py [--side 1024]`: prints a table; every k is checked by a float64 SVD.
Time is that of the processor, the shortest of several runs in turn, with one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from cases import full_svd, pair

from mergekit_monosoup.spectral import EditOptions, Split, edit_weight
from mergekit_monosoup.spectral.storing import Storage

INPUTS = [
    ("gaussian", torch.bfloat16),
    ("tuned", torch.bfloat16),
    ("lora", torch.bfloat16),
    ("gaussian", torch.float32),
    ("power", torch.float32),
    ("lora", torch.float32),
]
DG_HARD = EditOptions(Split("donoho_gavish"), "high")
STOCHASTIC = EditOptions(storage=Storage("stochastic", "benchmark"))


def shortest(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least time of each piece of work, done in turn, in seconds."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(repeats):
        for name, call in work.items():
            begin = time.thread_time()
            call()
            best[name] = min(best[name], time.thread_time() - begin)
    return best


def main() -> None:
    """Check, time and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1024, help="columns; there are half as many rows again")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| update | full SVD, ms | `monosoup` | `dg_hard` | its k | stochastic rounding |")
    print("|---|---|---|---|---|---|")
    for kind, dtype in INPUTS:
        base, tuned = pair(kind, options.side * 3 // 2, options.side, dtype)
        _, record = edit_weight(base, [tuned], options=DG_HARD)
        values = torch.linalg.svdvals(tuned.double() - base.double())
        expected = Split("donoho_gavish").index(values, tuple(base.shape))
        if record.k != expected:
            raise SystemExit(f"{kind}: k is {record.k}, not {expected}")
        took = shortest(
            {
                "svd": lambda base=base, tuned=tuned: full_svd(base, tuned),
                "monosoup": lambda base=base, tuned=tuned: edit_weight(base, [tuned]),
                "dg_hard": lambda base=base, tuned=tuned: edit_weight(base, [tuned], options=DG_HARD),
                "stochastic": lambda base=base, tuned=tuned: edit_weight(base, [tuned], options=STOCHASTIC),
            },
            options.repeats,
        )
        ratios = [f"{took['svd'] / took[name]:.1f} x" for name in ("monosoup", "dg_hard")]
        cost = f"{took['stochastic'] / took['monosoup'] - 1:+.1%}" if dtype == torch.bfloat16 else "-"
        name = str(dtype).removeprefix("torch.")
        print(f"| {kind}, {name} | {1e3 * took['svd']:.0f} | {' | '.join(ratios)} | {record.k} | {cost} |")


if __name__ == "__main__":
    main()
