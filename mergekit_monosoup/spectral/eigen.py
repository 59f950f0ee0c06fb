"""Symmetric eigen-decompositions, giving values at once and only those vectors that are asked for."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from mergekit_monosoup.spectral.tridiagonal import TornEigen

# Below this size a dense decomposition is as quick.
_SMALL = 256
# Share of the vectors up to which they are found one by one instead of by divide and conquer.
_FEW = 0.2
# Participation ratio, as a share of n, above which a spectrum is so flat that few of its directions will be
# left over by the effective rank, so that finding the values first is worth its time.
_FLAT = 0.6


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
        values, vectors = torch.linalg.eigh(matrix, UPLO="U")
        self.values: Tensor = values.double().cpu()
        self._vectors: Tensor = vectors

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return `[n, stop - start]` on the device of the matrix."""
        return self._vectors[:, start:stop]


class TridiagonalEigen:
    """LAPACK in three steps: tridiagonal form, its eigenpairs, vectors of the few asked for.

    A dense solver back-transforms all n vectors; the split needs those of the smaller subspace. The
    tridiagonal form keeps the bulk of a spectrum apart from its spikes, so that float32 may reach it (see
    `certify.reduction_error`); its eigenpairs are found in float64, because errors of eps lambda_1 would turn
    neighbouring vectors of the bulk into each other.

    Args:
        matrix: float32 or float64 `[n, n]` on the CPU, upper half filled; destroyed.
    """

    def __init__(self, matrix: Tensor) -> None:
        n = len(matrix)
        reduce = lapack.ssytrd if matrix.dtype == torch.float32 else lapack.dsytrd
        # LAPACK reads Fortran order: the upper half of a torch matrix is its lower one. Blocks of 64
        # columns: the size that its own query asks for, within a few per cent.
        form, diagonal, off, tau, info = reduce(matrix.numpy().T, lower=1, lwork=64 * n, overwrite_a=1)
        _require(info, "sytrd")
        self._diagonal, self._off = diagonal.astype(np.float64), off.astype(np.float64)
        # Float32 will do for the transformation: it errs by 1e-7 in every direction, whatever the gaps
        # between eigenvalues.
        form = np.asfortranarray(form, dtype=np.float32)
        # With lower storage it is 1 + Q', Q' the reflectors below the diagonal: the same memory, read from
        # its second number on.
        self._reflectors = form.ravel(order="K")[1 : 1 + n * (n - 1)].reshape((n, n - 1), order="F")
        self._tau = tau.astype(np.float32)
        squares = float((self._diagonal**2).sum() + 2 * (self._off**2).sum())
        self._torn: TornEigen | None = None
        if self._diagonal.sum() ** 2 > _FLAT * n * squares:
            values, info = lapack.dsterf(self._diagonal.copy(), self._off.copy())
            _require(info, "dsterf")
        else:
            self._torn = TornEigen(self._diagonal, self._off)
            values = self._torn.values
        self.values: Tensor = torch.from_numpy(values)

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return eigenvectors `start` to `stop`, float32 `[n, stop - start]`."""
        n, count = len(self._diagonal), stop - start
        inner = None
        if self._torn is None and count < _FEW * n:
            inner = self._iterated(start, stop)
        if inner is None:
            torn, self._torn = self._torn or TornEigen(self._diagonal, self._off), None
            inner = torn.vectors(start, stop)
            del torn
        vectors = np.empty((n, count), np.float32, order="F")
        vectors[0] = inner[0]
        below = np.asfortranarray(inner[1:], dtype=np.float32)
        del inner
        vectors[1:], _, info = lapack.sormqr(
            "L", "N", self._reflectors, self._tau, below, 64 * count, overwrite_c=1
        )
        _require(info, "sormqr")
        return torch.from_numpy(vectors)

    def _iterated(self, start: int, stop: int) -> Any:
        """Return vectors of the tridiagonal form by inverse iteration, or None where it does not apply."""
        n = len(self._diagonal)
        if not self._off.all():
            # Vectors of separate blocks would each need their own eigenvalues.
            return None
        one_block = np.ones(n, np.int32), np.full(n, n, np.int32)
        found, info = lapack.dstein(self._diagonal, self._off, self.values.numpy()[start:stop], *one_block)
        return found if info == 0 else None


def by_tridiagonal_form(n: int, device: torch.device) -> bool:
    """Say whether a Gram matrix `[n, n]` is decomposed by `TridiagonalEigen`."""
    return n > _SMALL and device.type == "cpu"


def decomposed(gram: Tensor) -> SymmetricEigen:
    """Decompose a Gram matrix in the way that suits its size and device.

    Args:
        gram: `[n, n]`, upper half filled, destroyed; float64, or float32 where it is reduced to
            tridiagonal form.
    """
    if by_tridiagonal_form(len(gram), gram.device):
        return TridiagonalEigen(gram)
    return DenseEigen(gram)


def _require(info: int, routine: str) -> None:
    if info != 0:
        raise np.linalg.LinAlgError(f"LAPACK {routine} failed with info = {info}")
