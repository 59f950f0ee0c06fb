"""Symmetric eigen-decompositions, giving values at once and only those vectors that are asked for."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from scipy.linalg import blas, lapack
from torch import Tensor

# Below this size a dense decomposition is as quick.
_SMALL = 256
# Share of the vectors up to which they are found one by one (MRRR) instead of all (divide and conquer).
_FEW = 0.2
_BY_INDEX = 2


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
    """LAPACK in float64 and three steps: tridiagonal form, its values, and vectors of the few asked for.

    A dense solver finds and back-transforms all n vectors; the split needs those of the smaller
    subspace. Float64 because errors of eps lambda_1 in float32, harmless to the values that carry the
    update, would turn neighbouring vectors of its bulk into each other.

    Args:
        matrix: float64 `[n, n]`, Fortran order, lower triangle filled; destroyed.
    """

    def __init__(self, matrix: Any) -> None:
        n = len(matrix)
        # Blocks of 64 columns: the size that LAPACK's own query asks for, within a few per cent.
        reflectors, self._diagonal, self._off, tau, info = lapack.dsytrd(
            matrix, lower=1, lwork=64 * n, overwrite_a=1
        )
        _require(info, "dsytrd")
        # With lower storage the transformation is 1 + Q', Q' the reflectors below the diagonal. Float32
        # will do for it: it errs by 1e-7 in every direction, whatever the gaps between eigenvalues.
        self._reflectors = np.asfortranarray(reflectors[1:, : n - 1], dtype=np.float32)
        self._tau = tau.astype(np.float32)
        values, info = lapack.dsterf(self._diagonal.copy(), self._off.copy())
        _require(info, "dsterf")
        self.values = torch.from_numpy(values)

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return eigenvectors `start` to `stop`, float32 `[n, stop - start]`."""
        n, count = len(self._diagonal), stop - start
        if count < _FEW * n:
            off = np.append(self._off, 0.0)
            _, _, inner, info = lapack.dstemr(
                self._diagonal.copy(), off, _BY_INDEX, 0.0, 0.0, start + 1, stop
            )
            _require(info, "dstemr")
            inner = np.asfortranarray(inner[:, :count], dtype=np.float32)
        else:
            _, inner, info = lapack.dstevd(self._diagonal.copy(), self._off.copy())
            _require(info, "dstevd")
            inner = np.asfortranarray(inner[:, start:stop], dtype=np.float32)
        lower, _, info = lapack.sormqr(
            "L",
            "N",
            self._reflectors,
            self._tau,
            np.asfortranarray(inner[1:]),
            64 * count,
            overwrite_c=1,
        )
        _require(info, "sormqr")
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
        """Decompose, in float64, the part of G whose columns are `live`, giving up the storage of G.

        Args:
            live: boolean `[n]` on the CPU.
        """
        n = int(live.sum())
        if not self._on_cpu:
            on_device = live.to(self._sum.device)
            whole = self._sum.double()
            del self._sum
            return DenseEigen(whole if n == len(live) else whole[on_device][:, on_device])
        matrix = self._lower.astype(np.float64, copy=False)
        del self._lower
        if n < len(live):
            keep = live.numpy()
            matrix = np.asfortranarray(matrix[keep][:, keep])
        if n <= _SMALL:
            # torch reads the lower triangle; the transpose of Fortran order is C order without a copy.
            return DenseEigen(torch.from_numpy(np.ascontiguousarray(matrix)))
        return TridiagonalEigen(matrix)


def _require(info: int, routine: str) -> None:
    if info != 0:
        raise np.linalg.LinAlgError(f"LAPACK {routine} failed with info = {info}")
