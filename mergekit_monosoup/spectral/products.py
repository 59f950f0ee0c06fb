"""The matrix products of an edit: BLAS by way of scipy on the CPU, torch elsewhere.

On the CPU the decomposition is LAPACK's, whose worker threads keep spinning for a while after each call.
torch's own threads would fight with them for the cores (measured: up to twice the time on two cores), so
that products are left to the same library, which also knows the half of a symmetric product, and what
is left to torch runs on one thread meanwhile: conversions, which wait for memory anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.linalg import blas
from torch import Tensor

# Blocks whose products are summed in the dtype of the blocks.
_SECTION = 16


@contextmanager
def one_torch_thread(device: torch.device) -> Iterator[None]:
    """Keep torch to one thread while BLAS and LAPACK have the cores; nothing changes off the CPU."""
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class GramSum:
    """Sum of block^T block `[n, n]`; on the CPU, the lower half in Fortran order.

    Products of a few blocks are summed in the dtype of the blocks, and these sums in float64: over the
    150,000 rows of an embedding, float32 would lose another digit. `sections` counts them.

    Args:
        n: columns of the blocks.
        dtype: float32 or float64, of the blocks.
        device: where the blocks lie.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self._half = device.type == "cpu"
        self._total: Any = None
        self._blocks = 0
        self.sections = 1
        if self._half:
            self._syrk = blas.dsyrk if dtype == torch.float64 else blas.ssyrk
            self._sum: Any = np.zeros((n, n), np.float64 if dtype == torch.float64 else np.float32, order="F")
        else:
            self._sum = torch.zeros(n, n, dtype=dtype, device=device)

    def add(self, block: Tensor) -> None:
        """Add block^T block, `block` being `[length, n]`."""
        if self._blocks == _SECTION:
            self._flush()
        self._blocks += 1
        if not self._half:
            self._sum.addmm_(block.T, block)
            return
        operand, transposed = _in_fortran_order(block)
        # C = A A^T without, A^T A with `trans`; a transposed view is block^T already.
        self._sum = self._syrk(
            1.0, operand, beta=1.0, c=self._sum, trans=1 - transposed, lower=1, overwrite_c=1
        )

    def _flush(self) -> None:
        if self._total is None:
            self._total = self._sum.astype(np.float64) if self._half else self._sum.double()
        else:
            self._total += self._sum
        self._sum[:] = 0
        self._blocks = 0
        self.sections += 1

    def diagonal(self) -> Tensor:
        """Return the squared norms of the n columns, float64 on the CPU."""
        found = self._diagonal_of(self._sum)
        return found if self._total is None else found + self._diagonal_of(self._total)

    def _diagonal_of(self, matrix: Any) -> Tensor:
        if self._half:
            return torch.from_numpy(matrix.diagonal().astype(np.float64))
        diagonal: Tensor = matrix.diagonal().double().cpu()
        return diagonal

    def participation(self) -> float:
        """Return (sum_i l_i)^2 / (n sum_i l_i^2) of the eigenvalues: 1 if flat, 1/n for rank 1."""
        parts = [self._sum] if self._total is None else [self._sum, self._total]
        trace = float(self.diagonal().sum())
        # Products of the two parts are left out: a yardstick, not a result.
        if self._half:
            squares = sum(
                float((blas.snrm2 if part.dtype == np.float32 else blas.dnrm2)(part.ravel(order="K"))) ** 2
                for part in parts
            )
            squares = 2 * squares - float(self.diagonal().square().sum())
        else:
            squares = sum(float(part.square().sum()) for part in parts)
        return trace**2 / (len(self.diagonal()) * squares)

    def take(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return G in `dtype`, giving up the sums; on the CPU its upper half alone is filled."""
        if self._total is not None:
            self._flush()
        result, self._sum, self._total = self._sum if self._total is None else self._total, None, None
        if self._half:
            kind = np.float64 if dtype == torch.float64 else np.float32
            return torch.from_numpy(result.astype(kind, copy=False).T)
        converted: Tensor = result.to(dtype)
        return converted


def add_projection(value: Tensor, delta: Tensor, basis: Tensor, factor: float) -> None:
    """Add factor * delta basis basis^T to `value` in place.

    Args:
        value, delta: `[length, n]`, of the same layout, rows or columns contiguous.
        basis: `[n, c]`.
        factor: a number.
    """
    if value.device.type != "cpu":
        value.addmm_(delta @ basis, basis.T, alpha=factor)
        return
    gemm = blas.dgemm if value.dtype == torch.float64 else blas.sgemm
    b = np.asfortranarray(basis.numpy())
    operand, transposed = _in_fortran_order(delta)
    target, _ = _in_fortran_order(value)
    if transposed:
        gemm(factor, b, gemm(1.0, b, operand, trans_a=1), beta=1.0, c=target, overwrite_c=1)
    else:
        gemm(factor, gemm(1.0, operand, b), b, trans_b=1, beta=1.0, c=target, overwrite_c=1)


def _in_fortran_order(block: Tensor) -> tuple[Any, int]:
    """Return an array that BLAS reads without a copy, and whether it is the transpose of the block."""
    array = block.numpy()
    return (array.T, 1) if array.flags.c_contiguous else (array, 0)
