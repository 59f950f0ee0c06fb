"""The orthogonal matrix that a reduction to tridiagonal form leaves behind, as products of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import lapack

from mergekit_monosoup.spectral.kernels.compiled import gemm

# Reflectors that are applied together.
_BLOCK = 128


class Reflectors:
    """Q = H_1 H_2 ... of H_j = 1 - t_j v_j v_j^T, by blocks 1 - V T V^T (Schreiber & Van Loan, 1989).

    T, upper triangular, is found from T^-1 + T^-T = V^T V (Puglisi, 1992): a product and a small inverse,
    where LAPACK multiplies matrices with vectors.

    Args:
        form: `[n, n]`, contiguous columns, v_j below the diagonal of column j but for its leading 1; what is
            on and above the diagonal is overwritten.
        factors: the t_j, `[n - 1]`.
    """

    def __init__(self, form: Any, factors: Any) -> None:
        self._form, self._factors = form, factors
        count = len(factors)
        parts = [(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
        self._blocks = [(part, self._prepared(part)) for part in parts]

    def _prepared(self, columns: tuple[int, int]) -> Any:
        """Write ones and zeros above the reflectors of a block and return its T."""
        start, stop = columns
        size = stop - start
        vectors = self._vectors(columns)
        vectors[:size] = np.tril(vectors[:size], -1)
        np.fill_diagonal(vectors[:size], 1)
        factors = self._factors[start:stop]
        if not factors.all():
            # H_j = 1 where t_j = 0: without its vector, any t_j will do.
            vectors[:, factors == 0] = 0
            factors = np.where(factors == 0, 1, factors)
        inverse = np.empty((size, size), vectors.dtype, order="F")
        gemm(1.0, vectors.T, vectors, 0.0, inverse)
        np.fill_diagonal(inverse, 1 / factors)
        triangle, info = lapack.strtri(inverse) if inverse.dtype == np.float32 else lapack.dtrtri(inverse)
        if info != 0:
            raise np.linalg.LinAlgError(f"LAPACK trtri failed with info = {info}")
        return np.triu(triangle)

    def _vectors(self, columns: tuple[int, int]) -> Any:
        start, stop = columns
        return self._form[start + 1 :, start:stop]

    def apply(self, columns: Any) -> None:
        """Replace columns `[n, c]`, contiguous each, by Q times them."""
        inner = np.empty((2, _BLOCK * columns.shape[1]), columns.dtype)
        for (start, stop), triangle in reversed(self._blocks):
            vectors, part = self._vectors((start, stop)), columns[start + 1 :]
            shape = (stop - start, columns.shape[1])
            seen, turned = (row[: shape[0] * shape[1]].reshape(shape, order="F") for row in inner)
            gemm(1.0, vectors.T, part, 0.0, seen)
            gemm(1.0, triangle, seen, 0.0, turned)
            gemm(-1.0, vectors, turned, 1.0, part)
