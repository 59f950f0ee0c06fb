"""Eigenpairs of a symmetric tridiagonal matrix: all values, and the vectors that are asked for.

Each vector is found for itself from its eigenvalue, by a twisted factorisation (Dhillon & Parlett, 2004), in
O(n), so that threads can share the vectors out. Values that are known to eps lambda_1 give vectors that are
orthogonal to eps lambda_1 / gap: in float64 that is nearly always enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import eigh_tridiagonal, lapack

from mergekit_monosoup.spectral.crew import crew
from mergekit_monosoup.spectral.kernels.compiled import TwistedVector, tridiagonal_values

# Neighbours closer than this, relative to the spread of the spectrum, are made orthogonal afterwards: the
# others are so to a few 1e-7, as float32 is, whatever the last digits of the processor.
_CLOSE = 1e-9
# How much of a vector must be left when the others of its group are taken out of it.
_INDEPENDENT = 0.05
# Residual, relative to the spread of the spectrum, from which a vector is none.
_RESIDUAL = 1e-9


class SymmetricTridiagonal:
    """T with its eigenvalues `values`, `[n]`, ascending, float64.

    Args:
        diagonal: `[n]`, float64.
        off: `[n - 1]`, float64.
    """

    def __init__(self, diagonal: Any, off: Any) -> None:
        self._diagonal, self._off = diagonal, off
        self.values: Any = tridiagonal_values(diagonal, off)

    def vectors(self, start: int, stop: int) -> Any:
        """Return eigenvectors `start` to `stop` in ascending order, float32 `[n, stop - start]`."""
        found = np.empty((len(self.values), stop - start), np.float32, order="F")
        if start < stop and not self._one_by_one(start, stop, found):
            # Values that agree in all digits: only a solver that finds the vectors together tells them apart.
            chosen = (start, stop - 1)
            _, found[:] = eigh_tridiagonal(self._diagonal, self._off, select="i", select_range=chosen)
        return found

    def _one_by_one(self, start: int, stop: int, found: Any) -> bool:
        """Fill `found`, or return False where that does not work."""
        values = self.values
        spread = float(values[-1] - values[0])
        # Below all values: T - shift is positive, and its factors are as exact as its entries.
        shift = float(values[0]) - 1e-8 * spread
        d, l, info = lapack.dpttrf(self._diagonal - shift, self._off)  # noqa: E741
        if spread == 0 or info != 0:
            return False

        def fill(part: range) -> float:
            twisted, worst = TwistedVector(d, l), 0.0
            for i in part:
                found[:, i - start], residual = twisted.find(values[i] - shift)
                worst = max(worst, residual) if residual == residual else np.inf
            return worst

        indices, crowd = range(start, stop), crew().size
        size = max(1, -(-len(indices) // crowd))
        worst = crew().map(fill, [indices[i : i + size] for i in range(0, len(indices), size)])
        if max(worst, default=0.0) > _RESIDUAL * spread:
            return False
        return all(_separated(found[:, group]) for group in _groups(values[start:stop], _CLOSE * spread))


def _groups(values: Any, distance: float) -> list[slice]:
    """Return the runs of neighbours that are closer than `distance`."""
    close = np.flatnonzero(np.diff(values) < distance)
    if len(close) == 0:
        return []
    runs = np.split(close, np.flatnonzero(np.diff(close) > 1) + 1)
    return [slice(int(run[0]), int(run[-1]) + 2) for run in runs]


def _separated(vectors: Any) -> bool:
    """Make a few vectors orthogonal in place; False where they are not independent."""
    orthogonal, triangle = np.linalg.qr(vectors)
    vectors[:] = orthogonal
    return bool(np.abs(np.diagonal(triangle)).min() >= _INDEPENDENT)
