"""A stack of experts: this package against a Python loop over full SVDs, side by side.

    python benchmarks/experts.py            # 8 experts of 192 x 512
    python benchmarks/experts.py --full     # 128 experts of 768 x 2048 (the loop is timed on a few of them)

Checks first that both give the same weights. Prints the times, their ratio, and how much memory each
took beyond its inputs, as a share of the stack in float32.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mergekit_monosoup.spectral.edit import EditOptions, edit_weight
from mergekit_monosoup.spectral.mixing import mixing_coefficients
from mergekit_monosoup.spectral.split import Split, split_index


def loop_over_svds(base: torch.Tensor, tuned: torch.Tensor, energy: float | None) -> torch.Tensor:
    """The edit as its formulas read, one expert after the other, on a float32 copy of the stack."""
    w0 = base.float()
    dw = tuned.float() - w0
    out = torch.empty_like(base)
    for index, matrix in enumerate(dw):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        k = split_index(s, energy)
        c = mixing_coefficients(s, k, "monosoup")
        high = (u[:, :k] * s[:k]) @ vt[:k]
        out[index] = w0[index] + c.lambda_high * high + c.lambda_low * (matrix - high)
    return out


def stack(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random stack in bfloat16 and a fine-tuned one with a decaying spectrum."""
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(experts, rows, columns, dtype=torch.bfloat16)
    tuned = torch.empty_like(base)
    decay = torch.arange(1, rows + 1).rsqrt()
    for w0, w1 in zip(base, tuned, strict=True):
        w0.copy_(0.02 * torch.randn(rows, columns, generator=generator))
        left = torch.randn(rows, rows, generator=generator) / rows**0.5
        right = torch.randn(rows, columns, generator=generator)
        w1.copy_(w0.float() + 2e-3 * (left * decay) @ right)
    return base, tuned


class PeakMemory:
    """Resident memory of this process above where it started, sampled while the body runs."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._start = self.peak = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._resident()) - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        return 0


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, int]:
    """Seconds and peak bytes of one call."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
    del result
    return seconds, memory.peak


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="128 x 768 x 2048")
    parser.add_argument("--svds", type=int, default=8, help="experts on which the loop is timed")
    parser.add_argument("--energy", type=float, default=None)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    experts, rows, columns = (128, 768, 2048) if arguments.full else (8, 192, 512)
    base, tuned = stack(experts, rows, columns)
    few = min(experts, arguments.svds)
    options = EditOptions(Split(energy=arguments.energy))

    ours, record = edit_weight(base[:2], [tuned[:2]], options=options)
    reference = loop_over_svds(base[:2], tuned[:2], arguments.energy)
    wrong = int((ours != reference).sum())
    # Entries may round to the neighbour; an edit that differs would move nearly all of them.
    assert wrong <= 2e-2 * reference.numel(), f"{wrong} of {reference.numel()} entries differ"
    print(f"same weights but for {wrong} of {reference.numel()} roundings; {record.matrices[0].backend}")

    svd_seconds, svd_peak = timed(lambda: loop_over_svds(base[:few], tuned[:few], arguments.energy))
    our_seconds, our_peak = timed(lambda: edit_weight(base, [tuned], options=options)[0])
    svd_seconds, svd_peak = svd_seconds * experts / few, svd_peak * experts // few
    whole = 4 * base.numel()
    scaled = "" if few == experts else f" (from {few} experts)"
    print(f"{experts} x {rows} x {columns}, {torch.get_num_threads()} threads")
    print(f"loop over SVDs  {svd_seconds:8.2f} s  {svd_peak / whole:5.2f} x the stack in float32{scaled}")
    print(f"this package    {our_seconds:8.2f} s  {our_peak / whole:5.2f} x (the result itself is 0.5)")
    print(f"ratio           {svd_seconds / our_seconds:8.2f}")


if __name__ == "__main__":
    main()
