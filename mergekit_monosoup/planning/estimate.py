"""How long a merge will take and how much memory it needs, from a short calibration."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_monosoup.planning.planned import PlannedTensor

# All constants of the model, measured by benchmarks/estimate.py.
# What Python, torch and transformers take before the first tensor is loaded.
_IMPORT_SECONDS = 7.0
_IMPORT_BYTES = 480e6
# Loaders keep what they have read mapped up to this, and one unit more.
_MAPPED_BYTES = 1 << 28
# What an edit holds at a time in float64 squares of the smaller side, and any unit in float32 copies.
_SQUARES, _WHOLE_COPIES = 4, 2
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
    """What one core of this machine does in a second, and how many there are."""

    flops: float
    eigen_flops: float
    bytes: float
    hashed_bytes: float
    cores: int


@dataclass(frozen=True)
class Estimate:
    """Cost of a merge on this machine's processor; good to a factor of about 1.5 while it is idle."""

    seconds: float
    peak_bytes: float
    start_seconds: float = _IMPORT_SECONDS
    """Of `seconds`, what is spent before the first tensor."""


def calibrate() -> Speed:
    """Time a matrix product, an eigenvalue problem, a copy and a hash on one core; a fifth of a second."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    generator = np.random.default_rng(0)
    a = generator.standard_normal((512, 512), dtype=np.float32)
    b = (a[:_EIGEN_SIZE] @ a[:_EIGEN_SIZE].T).astype(np.float64)
    block = np.ones(1 << 22, dtype=np.float32)
    hashed = block[: 1 << 18].tobytes()
    return Speed(
        flops=2 * 512**3 / _best(lambda: a @ a),
        eigen_flops=_EIGEN_SIZE**3 / _best(lambda: np.linalg.eigh(b)),
        bytes=2 * block.nbytes / _best(lambda: block.copy()),
        hashed_bytes=len(hashed) / _best(lambda: hashlib.sha256(hashed).digest()),
        cores=cores,
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


def estimate(tensors: Sequence[PlannedTensor], speed: Speed) -> Estimate:
    """Return the cost of the planned tensors, each computed on a core of its own.

    A decomposition of a rows x columns matrix with r = min and c = max of them costs a Gram product
    (2 r^2 c), the eigenvectors that are needed (r^3 in units of the calibration) and the projection
    (2 r^2 c); it reads the matrix in blocks and holds a few float64 squares of the smaller side. Inputs and
    outputs are hashed. In memory are the units in flight: one a core, and one that is read ahead or written.

    Args:
        tensors: what will be done.
        speed: of this machine.
    """
    times = [_seconds(tensor, speed) for tensor in tensors]
    # The largest unit may be the last to end.
    busy = max(sum(times) / speed.cores, max(times, default=0.0))
    largest = sorted((_scratch(tensor) for tensor in tensors), reverse=True)[: speed.cores]
    ahead = max((tensor.read_bytes + tensor.write_bytes for tensor in tensors), default=0.0)
    mapped = min(sum(tensor.read_bytes for tensor in tensors), _MAPPED_BYTES)
    return Estimate(_IMPORT_SECONDS + busy, _IMPORT_BYTES + mapped + ahead + sum(largest))


def _seconds(tensor: PlannedTensor, speed: Speed) -> float:
    seconds = _PASSES * 4.0 * tensor.size / speed.bytes
    seconds += (tensor.read_bytes + tensor.write_bytes) / speed.hashed_bytes
    if tensor.matrices is not None:
        count, rows, columns = tensor.matrices
        r, c = min(rows, columns), max(rows, columns)
        gain = min(_MOST_GAIN, max(1.0, (r / _EIGEN_SIZE) ** _EIGEN_GAIN))
        seconds += count * (4.0 * r * r * c / speed.flops + _EIGEN_COST * r**3 / (gain * speed.eigen_flops))
    return seconds


def _scratch(tensor: PlannedTensor) -> float:
    """Return what computing a tensor holds above its mapped inputs."""
    if tensor.matrices is None:
        return _WHOLE_COPIES * 4.0 * tensor.size + tensor.write_bytes
    _, rows, columns = tensor.matrices
    return _SQUARES * 8.0 * min(rows, columns) ** 2 + tensor.write_bytes
