"""Eigenvalues of a Gram matrix on the CPU, and only those vectors that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_monosoup.spectral.crew import crew, with_blas_threads
from mergekit_monosoup.spectral.kernels.compiled import tridiagonal_form
from mergekit_monosoup.spectral.kernels.reflectors import Reflectors
from mergekit_monosoup.spectral.kernels.tridiagonal import SymmetricTridiagonal

# Columns that are reduced together: few while the matrix is in the cache, more where it is not.
_PANEL, _WIDE_PANEL = 16, 32
_LARGE = 1536


class TridiagonalEigen:
    """Tridiagonal form, its eigenvalues, and the vectors that are asked for.

    A dense solver finds and transforms all n vectors; the split needs those of the smaller subspace. The
    tridiagonal form keeps the bulk of a spectrum apart from its spikes, so that float32 may reach it (see
    `certify.reduction_error`); its eigenpairs are found in float64, because errors of eps lambda_1 would turn
    neighbouring vectors of the bulk into each other.

    Args:
        matrix: float32 or float64 `[n, n]` on the CPU, upper half filled; destroyed.
    """

    def __init__(self, matrix: Tensor) -> None:
        # LAPACK reads Fortran order: the upper half of a torch matrix is its lower one.
        form = matrix.numpy().T
        large = len(form) >= _LARGE
        with with_blas_threads(worthwhile=large):
            diagonal, off, factors = tridiagonal_form(form, _WIDE_PANEL if large else _PANEL)
        # Float32 will do for the transformation: it errs by 1e-7 in every direction, whatever the gaps
        # between eigenvalues.
        with np.errstate(over="ignore"):  # in the other half, which is not read
            form, factors = np.asfortranarray(form, np.float32), factors.astype(np.float32)
        diagonal, off = diagonal.astype(np.float64), off.astype(np.float64)
        # The values come one after the other; another thread has the time to prepare for the vectors.
        parts: list[Callable[[], Any]] = [
            lambda: SymmetricTridiagonal(diagonal, off),
            lambda: Reflectors(form, factors),
        ]
        self._inner, self._reflectors = crew().map(lambda part: part(), parts)
        self.values: Tensor = torch.from_numpy(self._inner.values)

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return eigenvectors `start` to `stop`, float32 `[n, stop - start]`."""
        found = self._inner.vectors(start, stop)
        crew().map(self._reflectors.apply, np.array_split(found, crew().size, axis=1))
        return torch.from_numpy(found)
