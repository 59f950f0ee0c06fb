"""The matrix products of an edit: by a crew of threads on the CPU, by torch elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.linalg import blas
from torch import Tensor

from mergekit_monosoup.spectral import kernels
from mergekit_monosoup.spectral.crew import crew
from mergekit_monosoup.spectral.kernels.compiled import gemm, syrk

# Rows whose products are summed in the dtype of the blocks.
_SECTION = 8192
# Products that are summed before they are added to the others. Libraries sum up to 400 in a row, depending on
# the processor, and the error of a sum grows with the root of its length: `certify` relies on no more.
_CHAIN = 160


class GramSum:
    """Sum of block^T block `[n, n]`; on the CPU, the lower half in Fortran order.

    Products of a few blocks are summed in the dtype of the blocks, and these sums in float64: over the
    150,000 rows of an embedding, float32 would lose another digit.

    Args:
        n: columns of the blocks.
        dtype: float32 or float64, of the blocks.
        device: where the blocks lie.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self._half = kernels.serve(device)
        self._total: Any = None
        self._rows = 0
        self._closed: list[int] = []
        if self._half:
            self._sum: Any = np.zeros((n, n), np.float64 if dtype == torch.float64 else np.float32, order="F")
        else:
            self._sum = torch.zeros(n, n, dtype=dtype, device=device)

    def add(self, blocks: Sequence[Tensor]) -> None:
        """Add block^T block of some blocks `[length, n]`, in their order."""
        for section in self._sections(blocks):
            if not self._half:
                # An accelerator sums in its own way, which its tests answer for.
                chain = _CHAIN if self._sum.device.type == "cpu" else _SECTION
                for block in section:
                    for first in range(0, len(block), chain):
                        rows = block[first : first + chain]
                        self._sum.addmm_(rows.T, rows)
                continue
            arrays = [block.numpy() for block in section]
            crew().map(partial(self._add_part, arrays), self._parts())

    def _sections(self, blocks: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield the blocks in groups that belong to one section each."""
        group: list[Tensor] = []
        for block in blocks:
            if self._rows + len(block) > _SECTION and self._rows > 0:
                if group:
                    yield group
                group = []
                self._flush()
            self._rows += len(block)
            group.append(block)
        if group:
            yield group

    @property
    def sections(self) -> float:
        """To how many sections of equal length the sums amount."""
        lengths = [*self._closed, *([self._rows] if self._rows else [])]
        return sum(lengths) ** 2 / sum(length**2 for length in lengths)

    def _parts(self) -> list[tuple[int, int]]:
        """Cut the columns so that their halves below the diagonal are of the same size."""
        n, size = len(self._sum), crew().size
        edges = [round(n * (1 - math.sqrt(1 - i / size))) for i in range(size + 1)]
        return list(pairwise(edges))

    def _add_part(self, arrays: list[Any], part: tuple[int, int]) -> None:
        start, stop = part
        for array in arrays:
            for first in range(0, len(array), _CHAIN):
                rows = array[first : first + _CHAIN]
                syrk(rows[:, start:stop].T, self._sum[start:stop, start:stop])
                if stop < len(self._sum):
                    gemm(1.0, rows[:, stop:].T, rows[:, start:stop], 1.0, self._sum[stop:, start:stop])

    def _flush(self) -> None:
        if self._half:
            if self._total is None:
                self._total = np.zeros_like(self._sum, dtype=np.float64)
            crew().map(self._flush_part, self._parts())
        else:
            # A copy, also of a sum that is in float64 already: it is set to zero.
            grown = (
                self._sum.to(torch.float64, copy=True) if self._total is None else self._total.add_(self._sum)
            )
            self._total = grown
            self._sum.zero_()
        self._closed.append(self._rows)
        self._rows = 0

    def _flush_part(self, part: tuple[int, int]) -> None:
        lower = slice(part[0], None), slice(*part)
        self._total[lower] += self._sum[lower]
        self._sum[lower] = 0

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
    if not kernels.serve(value.device):
        value.addmm_(delta @ basis, basis.T, alpha=factor)
        return
    d, b = delta.numpy(), basis.numpy()
    inner = np.empty((len(d), b.shape[1]), d.dtype, order="C" if d.flags.c_contiguous else "F")
    gemm(1.0, d, b, 0.0, inner)
    gemm(factor, inner, b.T, 1.0, value.numpy())
