"""Eigenpairs of a symmetric tridiagonal matrix by one step of divide and conquer, in little memory.

LAPACK's divide and conquer forms all n eigenvectors, with two float64 squares of size n to do it. Here the
matrix is torn in two, LAPACK decomposes the halves, and the last step is done for the wanted vectors alone,
from halves kept in float32: T = diag(T1, T2) + rho v v^T (Cuppen, 1981), whose eigenvalues are the roots of a
secular equation, with vectors that are orthogonal without further work (Gu & Eisenstat, 1995).
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from scipy.linalg import blas, cython_lapack, lapack

# Entries below this many eps of the largest are zero to the rank-one update, as in LAPACK's dlaed2.
_NEGLIGIBLE = 8.0


def _secular_root() -> Any:
    """Return LAPACK's dlaed4, which scipy exports for callers of compiled code."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    capsule = cython_lapack.__pyx_capi__["dlaed4"]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 8)(address(capsule, name(capsule)))


_DLAED4 = _secular_root()


class TornEigen:
    """Eigenvalues at once, eigenvectors of T on request.

    Args:
        diagonal: `[n]`, float64, n >= 4.
        off: `[n - 1]`, float64.

    Attributes:
        values: `[n]`, ascending, float64.
    """

    def __init__(self, diagonal: Any, off: Any) -> None:
        # What is negligible is judged against numbers of about 1; a power of two changes no digit.
        peak = max(np.abs(diagonal).max(), np.abs(off).max())
        scale = 2.0 ** min(1022, -math.frexp(peak)[1]) if peak > 0 else 1.0
        diagonal, off = diagonal * scale, off * scale
        middle = len(diagonal) // 2
        rho = abs(off[middle - 1])
        sign = 1.0 if off[middle - 1] >= 0 else -1.0
        upper, lower = diagonal[:middle].copy(), diagonal[middle:].copy()
        upper[-1] -= rho
        lower[0] -= rho
        first, self._upper, ends = _half(upper, off[: middle - 1], -1)
        second, self._lower, starts = _half(lower, off[middle:], 0)
        d = np.concatenate([first, second])
        # v has norm sqrt(2) and rho is doubled for it.
        z = np.concatenate([ends, sign * starts]) / np.sqrt(2)
        self._order = np.argsort(d, kind="stable")
        self._rotations: list[tuple[int, int, float, float]] = []
        self._update = _Secular(*self._deflated(d[self._order], z[self._order], 2 * rho), 2 * rho)
        found = np.concatenate([self._update.roots, self._poles])
        self._ascending = np.argsort(found, kind="stable")
        self.values: Any = found[self._ascending] / scale

    def _deflated(self, d: Any, z: Any, rho: float) -> tuple[Any, Any]:
        """Return the d and z that the update changes; note the others and the rotations that made them."""
        negligible = _NEGLIGIBLE * np.finfo(np.float64).eps * max(np.abs(d).max(), np.abs(z).max())
        kept: list[int] = []
        alone: list[int] = []
        for i in range(len(d)):
            if rho * abs(z[i]) <= negligible:
                alone.append(i)
                continue
            if kept:
                last = kept[-1]
                length = math.hypot(z[i], z[last])
                c, s = z[i] / length, -z[last] / length
                if abs((d[i] - d[last]) * c * s) <= negligible:
                    z[last], z[i] = 0.0, length
                    d[last], d[i] = d[last] * c**2 + d[i] * s**2, d[last] * s**2 + d[i] * c**2
                    self._rotations.append((last, i, c, s))
                    alone.append(kept.pop())
            kept.append(i)
        self._kept, self._alone = np.array(kept, dtype=int), np.array(alone, dtype=int)
        self._poles = d[self._alone]
        return d[self._kept], z[self._kept]

    def vectors(self, start: int, stop: int) -> Any:
        """Return eigenvectors `start` to `stop` in ascending order, float32 `[n, stop - start]`."""
        chosen, middle = self._ascending[start:stop], len(self._upper)
        # One row a vector and one array a half, which BLAS reads without a copy.
        halves = [np.zeros((len(chosen), len(half)), np.float32) for half in (self._upper, self._lower)]
        rows = self._order[self._kept]
        above = rows < middle
        upper_rows, lower_rows = rows[above], rows[~above] - middle
        for column, index in enumerate(chosen):
            if index < len(self._kept):
                vector = self._update.vector(index)
                halves[0][column, upper_rows] = vector[above]
                halves[1][column, lower_rows] = vector[~above]
            else:
                _row(halves, self._order[self._alone[index - len(self._kept)]])[column] = 1.0
        for last, i, c, s in reversed(self._rotations):
            x, y = (_row(halves, self._order[index]) for index in (last, i))
            x[:], y[:] = c * x - s * y, s * x + c * y
        lower = blas.sgemm(1.0, self._lower, halves.pop().T)
        upper = blas.sgemm(1.0, self._upper, halves.pop().T)
        found = np.empty((len(self._order), len(chosen)), np.float32, order="F")
        found[:middle], found[middle:] = upper, lower
        return found


def _row(halves: list[Any], index: int) -> Any:
    middle = halves[0].shape[1]
    return halves[0][:, index] if index < middle else halves[1][:, index - middle]


class _Secular:
    """Eigenpairs of diag(d) + rho z z^T, d ascending and apart, no z zero.

    `roots` are the eigenvalues, ascending. The vectors belong to the z for which the computed roots are
    exact: that makes them orthogonal however close roots and poles are.
    """

    roots: Any

    def __init__(self, d: Any, z: Any, rho: float) -> None:
        size = len(d)
        self._dense: Any = None
        if size <= 2:
            # dlaed4 returns vectors instead of differences here.
            self.roots, self._dense = np.linalg.eigh(np.diag(d) + rho * np.outer(z, z))
            return
        self._d, self._z = d, z / np.linalg.norm(z)
        rho = rho * float(z @ z)
        self._delta, self._root, self._info = np.empty(size), ctypes.c_double(), ctypes.c_int()
        self._index = ctypes.c_int()
        self._constants = (ctypes.c_int(size), ctypes.c_double(rho))
        reference = ctypes.byref
        self._arguments = (
            reference(self._constants[0]),
            reference(self._index),
            self._d.ctypes.data,
            self._z.ctypes.data,
            self._delta.ctypes.data,
            reference(self._constants[1]),
            reference(self._root),
            reference(self._info),
        )
        self.roots = np.empty(size)
        products = -np.ones(size)
        for j in range(size):
            delta = self._solve(j)
            self.roots[j] = self._root.value
            gaps = d - d[j]
            gaps[j] = 1.0
            products *= delta / gaps
        self._exact = np.copysign(np.sqrt(np.abs(products)), self._z)

    def _solve(self, j: int) -> Any:
        """Return d - root j, to full relative precision; it is overwritten by the next call."""
        self._index.value = j + 1
        _DLAED4(*self._arguments)
        if self._info.value != 0:
            raise np.linalg.LinAlgError(f"LAPACK dlaed4 failed with info = {self._info.value}")
        return self._delta

    def vector(self, j: int) -> Any:
        """Return eigenvector j, float64 of norm 1."""
        if self._dense is not None:
            return self._dense[:, j]
        found = self._exact / self._solve(j)
        found /= math.sqrt(float(found @ found))
        return found


def _half(diagonal: Any, off: Any, row: int) -> tuple[Any, Any, Any]:
    """Return eigenvalues, float32 eigenvectors and the given row of the float64 ones."""
    values, vectors, info = lapack.dstevd(diagonal, off)
    if info != 0:
        raise np.linalg.LinAlgError(f"LAPACK dstevd failed with info = {info}")
    return values, vectors.astype(np.float32), vectors[row].copy()
