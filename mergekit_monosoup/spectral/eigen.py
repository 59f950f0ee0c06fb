"""Symmetric eigen-decompositions, giving values at once and only those vectors that are asked for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mergekit_monosoup.spectral import kernels
from mergekit_monosoup.spectral.kernels.eigen import TridiagonalEigen

# Below this size a dense decomposition is as quick.
_SMALL = 256


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


def by_tridiagonal_form(n: int, device: torch.device) -> bool:
    """Say whether a Gram matrix `[n, n]` is decomposed by `TridiagonalEigen`."""
    return n > _SMALL and kernels.serve(device)


def decomposed(gram: Tensor) -> SymmetricEigen:
    """Decompose a Gram matrix in the way that suits its size and device.

    Args:
        gram: `[n, n]`, upper half filled, destroyed; float64, or float32 where it is reduced to
            tridiagonal form.
    """
    if by_tridiagonal_form(len(gram), gram.device):
        return TridiagonalEigen(gram)
    return DenseEigen(gram)
