"""How long a merge will take and how much memory it needs, from a short calibration."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_monosoup.planning.planned import PlannedTensor

# What Python, torch and transformers take before the first tensor is loaded.
_IMPORT_SECONDS = 8.0
_IMPORT_BYTES = 550e6
# What exists together: Gram matrix, its reduced form, vectors, basis; or base, update, mean, result.
_COPIES = 4
# Reading, converting, checking and writing pass over a tensor about this often.
_PASSES = 12
_MOMENT = 0.1
_EIGEN_SIZE = 320
# Eigenvalue problems gain on the calibration with their size, until memory bounds them (measured).
_EIGEN_GAIN, _MOST_GAIN = 0.7, 4.0
# All values, but only the vectors on the smaller side of the split, are found.
_EIGEN_COST = 0.45


@dataclass(frozen=True)
class Speed:
    """What this machine does in a second."""

    flops: float
    eigen_flops: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """Cost of a merge on this machine's processor; good to a factor of about two."""

    seconds: float
    peak_bytes: float


def calibrate() -> Speed:
    """Time a matrix product, an eigenvalue problem and a copy; a fifth of a second.

    On one core, so that other work on the machine does not decide the result; the product is taken to
    use all cores, the eigenvalue problem two of them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    generator = np.random.default_rng(0)
    a = generator.standard_normal((512, 512), dtype=np.float32)
    b = (a[:_EIGEN_SIZE] @ a[:_EIGEN_SIZE].T).astype(np.float64)
    block = np.ones(1 << 22, dtype=np.float32)
    return Speed(
        flops=0.7 * cores * 2 * 512**3 / _best(lambda: a @ a),
        eigen_flops=min(cores, 2) * _EIGEN_SIZE**3 / _best(lambda: np.linalg.eigh(b)),
        bytes=2 * block.nbytes / _best(lambda: block.copy()),
    )


def _best(work: Callable[[], object]) -> float:
    """Return the shortest of a few runs; on a busy machine, of as many as fit into a moment."""
    times: list[float] = []
    end = time.perf_counter() + _MOMENT
    while len(times) < 5 and (len(times) < 2 or time.perf_counter() < end):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return max(min(times), 1e-6)


def estimate(tensors: Sequence[PlannedTensor], shard_bytes: float, speed: Speed) -> Estimate:
    """Return the cost of the planned tensors.

    A decomposition of a rows x columns matrix with r = min and c = max of them costs a Gram product
    (2 r^2 c), the eigenvectors that are needed (r^3 in units of the calibration) and the projection
    (2 r^2 c); it reads the matrix in blocks and holds a few float64 squares of the smaller side. Other
    tensors are held in float32 as a whole.

    Args:
        tensors: what will be done.
        shard_bytes: size of an output shard, which mergekit holds in memory until it is full.
        speed: of this machine.
    """
    seconds = _IMPORT_SECONDS
    peak = 0.0
    for tensor in tensors:
        working = tensor.read_bytes + tensor.write_bytes
        seconds += _PASSES * 4.0 * tensor.size / speed.bytes
        if tensor.matrices is not None:
            count, rows, columns = tensor.matrices
            r, c = min(rows, columns), max(rows, columns)
            gain = min(_MOST_GAIN, max(1.0, (r / _EIGEN_SIZE) ** _EIGEN_GAIN))
            eigen = _EIGEN_COST * r**3 / (gain * speed.eigen_flops)
            seconds += count * (4.0 * r * r * c / speed.flops + eigen)
            working += _COPIES * 8.0 * r * r
        else:
            working += _COPIES * 4.0 * tensor.size
        peak = max(peak, working)
    written = sum(t.write_bytes for t in tensors)
    return Estimate(seconds, _IMPORT_BYTES + peak + min(written, shard_bytes))
