"""Singular values of an update and the part of it that lies in the leading directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """A decomposed matrix: singular values, and the means to project on the leading ones.

    `singular_values` is `[r]`, descending, r = min(rows, columns), in units of the matrix;
    `backend` names how they were obtained.
    """

    singular_values: Tensor
    backend: str
    _left: Tensor
    _right: Tensor

    def high_part(self, k: int) -> Tensor:
        """Return dW_high = sum_{i<=k} s_i u_i v_i^T, `[rows, columns]`."""
        return (self._left[:, :k] * self.singular_values[:k]) @ self._right[:k]


def decompose(matrix: Tensor) -> Spectrum:
    """Return the spectrum of one matrix by a thin SVD.

    Args:
        matrix: `[rows, columns]`, finite, float32 or float64.
    """
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # The divide-and-conquer driver can fail to converge in float32; float64 has the headroom.
        parts = torch.linalg.svd(matrix.double(), full_matrices=False)
        left, values, right = (part.to(matrix.dtype) for part in parts)
    return Spectrum(values, "svd", left, right)
