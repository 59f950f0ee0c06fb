"""Symmetric eigen-decompositions, giving values at once and only those vectors that are asked for."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from scipy.linalg import blas, lapack
from torch import Tensor

# Below this size a dense float64 decomposition costs less than deciding whether float32 will do.
SMALL = 256


class VectorSource(Protocol):
    """Eigenvectors of a symmetric matrix `[n, n]` on request."""

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return eigenvectors number `start` to `stop` in ascending order, `[n, stop - start]`."""
        ...


class SymmetricEigen(VectorSource, Protocol):
    """Eigenvalues of a symmetric matrix, `[n]`, ascending, float64 on the CPU, and its vectors."""

    values: Tensor


class DenseEigen:
    """All vectors at once through torch, on the matrix's own device.

    `values` is `[n]`, ascending, float64 on the CPU: copying them is the one synchronisation that
    the decision about the split needs.
    """

    def __init__(self, matrix: Tensor) -> None:
        values, vectors = torch.linalg.eigh(matrix)
        self.values: Tensor = values.double().cpu()
        self._vectors: Tensor = vectors

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return `[n, stop - start]` on the device of the matrix."""
        return self._vectors[:, start:stop]


class TridiagonalEigen:
    """LAPACK in three steps: tridiagonal form, its eigenvectors, back-transformation of some.

    A dense solver back-transforms all n vectors, half of its work; the split needs only those of the
    smaller subspace. Works in the storage of the matrix: at most 3 n^2 numbers are held.

    Args:
        matrix: `[n, n]`, Fortran order, lower triangle filled; destroyed.
    """

    def __init__(self, matrix: Any) -> None:
        n = len(matrix)
        self._double = matrix.dtype == np.float64
        sytrd, stevd = (lapack.dsytrd, lapack.dstevd) if self._double else (lapack.ssytrd, lapack.sstevd)
        # 64 columns a block: LAPACK's own choice for the blocked reduction, within a few per cent.
        self._reflectors, diagonal, off, self._tau, info = sytrd(matrix, lower=1, lwork=64 * n, overwrite_a=1)
        _require(info, "sytrd")
        values, self._inner, info = stevd(diagonal, off)
        _require(info, "stevd")
        self.values = torch.from_numpy(values).double()

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return `[n, stop - start]`; the reflectors are applied to these columns alone."""
        inner = np.asfortranarray(self._inner[:, start:stop])
        n, count = inner.shape
        ormqr = lapack.dormqr if self._double else lapack.sormqr
        # With lower storage the transformation is 1 + Q', Q' the reflectors below the diagonal.
        lower, _, info = ormqr(
            "L",
            "N",
            np.asfortranarray(self._reflectors[1:, : n - 1]),
            self._tau,
            np.asfortranarray(inner[1:]),
            64 * count,
            overwrite_c=1,
        )
        _require(info, "ormqr")
        inner[1:] = lower
        return torch.from_numpy(inner)


class GramAccumulator:
    """G = dW^T dW `[n, n]` over the blocks of an update, each product computed by half on the CPU.

    Args:
        n: length of the smaller side.
        dtype: float32 or float64, of the blocks and of the sums.
        device: where the blocks come from.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            self._lower: Any = np.zeros((n, n), torch.empty(0, dtype=dtype).numpy().dtype, order="F")
            self._syrk = blas.dsyrk if dtype == torch.float64 else blas.ssyrk
        else:
            self._sum = torch.zeros(n, n, dtype=dtype, device=device)

    def add(self, block: Tensor) -> None:
        """Add block^T block, `block` being `[length, n]`."""
        if not self._on_cpu:
            self._sum.addmm_(block.T, block)
            return
        rows = block.numpy()
        # BLAS reads Fortran order: a tall block is handed over as its transpose, a wide one as it is.
        operand, transposed = (rows.T, 0) if rows.flags.c_contiguous else (rows, 1)
        self._lower = self._syrk(
            1.0, operand, beta=1.0, c=self._lower, trans=transposed, lower=1, overwrite_c=1
        )

    def diagonal(self) -> Tensor:
        """Return the squared norms of the n columns, float64 on the CPU."""
        if self._on_cpu:
            return torch.from_numpy(self._lower.diagonal().astype(np.float64))
        return self._sum.diagonal().double().cpu()

    def eigen(self, live: Tensor) -> SymmetricEigen:
        """Decompose the part of G whose columns are `live`, giving up the storage of G.

        Args:
            live: boolean `[n]` on the CPU.
        """
        n = int(live.sum())
        if not self._on_cpu:
            on_device = live.to(self._sum.device)
            return DenseEigen(self._sum if n == len(live) else self._sum[on_device][:, on_device])
        matrix = self._lower
        del self._lower
        if n < len(live):
            keep = live.numpy()
            matrix = np.asfortranarray(matrix[keep][:, keep])
        if n <= SMALL:
            # torch reads the lower triangle; the transpose of Fortran order is C order without a copy.
            return DenseEigen(torch.from_numpy(np.ascontiguousarray(matrix)))
        return TridiagonalEigen(matrix)


def _require(info: int, routine: str) -> None:
    if info != 0:
        raise np.linalg.LinAlgError(f"LAPACK {routine} failed with info = {info}")
