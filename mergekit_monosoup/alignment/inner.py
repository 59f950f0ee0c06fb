"""Inner products of the updates of one tensor, safe at any magnitude."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError, ShapeMismatchError

# Entries of one update that are worked on at a time: bounds the memory, and keeps each sum of
# products in the working precision short. The sums of the blocks are added in float64.
_BLOCK = 1 << 18

# Largest power of two, either way, by which the working dtypes can be scaled without overflow.
_LARGEST_SHIFT = {torch.float32: 126, torch.float64: 1022}


@dataclass(frozen=True)
class InnerProducts:
    """What N updates of one tensor have in common; both tensors are float64 `[rows, N, N]` on the CPU.

    `values` are <dW_i, dW_j>, up to one positive factor a row that no ratio depends on; `cosines`
    are cos(dW_i, dW_j), and 0 where either update is zero (on the diagonal too).
    """

    values: Tensor
    cosines: Tensor


def inner_products(base: Tensor, finetuned: Sequence[Tensor], *, rows: int = 1) -> InnerProducts:
    """Return <W_i - W0, W_j - W0> for all pairs.

    The updates are formed after upcasting, in float32 (float64 if any input is float64), scaled by
    powers of two so that no square leaves the range of the dtype, multiplied in blocks, and the
    blocks are added in float64.

    Args:
        base: W0, of any floating dtype and any shape.
        finetuned: the N tensors W_i, of the same shape.
        rows: read the tensors as `[rows, entries]` and treat every row by itself.

    Raises:
        ShapeMismatchError: the shapes differ.
        NonFiniteError: an update holds NaN or infinity.
    """
    if any(tensor.shape != base.shape for tensor in finetuned):
        raise ShapeMismatchError(
            f"shapes differ: {tuple(base.shape)} and {[tuple(tensor.shape) for tensor in finetuned]}"
        )
    count = len(finetuned)
    if base.numel() == 0:
        zero = torch.zeros(rows, count, count, dtype=torch.float64, device="cpu")
        return InnerProducts(zero, zero)
    products, exponents = Updates(base, finetuned, rows).products()
    if not bool(products.isfinite().all()):
        raise NonFiniteError("an update holds NaN or infinity, or overflows its dtype")
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    cosines = torch.where(scale > 0, products / scale, torch.zeros_like(products)).clamp(-1, 1)
    # Undo the scaling up to the exponent of the row's largest update.
    below = exponents - exponents.amax(dim=1, keepdim=True)
    return InnerProducts(_shifted(products, below[:, :, None] + below[:, None, :]), cosines)


class Updates:
    """The updates of one tensor, formed block by block and never as a whole."""

    def __init__(self, base: Tensor, finetuned: Sequence[Tensor], rows: int) -> None:
        tensors = [tensor.detach().reshape(rows, -1) for tensor in (base, *finetuned)]
        self.base, self.finetuned = tensors[0], tensors[1:]
        double = any(tensor.dtype == torch.float64 for tensor in tensors)
        self.dtype = torch.float64 if double else torch.float32
        # Where sums are kept: Apple's GPUs know no float64.
        self.home = torch.device("cpu") if base.device.type == "mps" else base.device

    def blocks(self) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Yield each block with its part of W0, `[rows, columns]`, and its updates, `[N, rows, columns]`."""
        rows, columns = self.base.shape
        wide = min(columns, _BLOCK)
        tall = max(1, _BLOCK // wide)
        for row in range(0, rows, tall):
            for column in range(0, columns, wide):
                block = (slice(row, row + tall), slice(column, column + wide))
                start = self.base[block].to(self.dtype)
                updates = start.new_empty(len(self.finetuned), *start.shape)
                for tensor, update in zip(self.finetuned, updates, strict=True):
                    torch.sub(tensor[block].to(self.dtype), start, out=update)
                yield block, start, updates

    def products(self) -> tuple[Tensor, Tensor]:
        """Return <dW_i, dW_j> 2^-(e_i + e_j), float64 `[rows, N, N]`, and e, int64 `[rows, N]`.

        For float32, e is 0: each block is scaled by itself, and float64 has room for any sum. For
        float64, e comes from a pass of its own.
        """
        count, rows = len(self.finetuned), len(self.base)
        exponents = torch.zeros(rows, count, dtype=torch.int64, device=self.home)
        if self.dtype == torch.float64:
            exponents -= _LARGEST_SHIFT[self.dtype]
            for (block, _), _, updates in self.blocks():
                exponents[block] = torch.maximum(exponents[block], self._exponents(updates))
        total = torch.zeros(rows, count, count, dtype=torch.float64, device=self.home)
        for (block, _), _, updates in self.blocks():
            own = self._exponents(updates)
            scales = _shifted(torch.ones_like(own, dtype=torch.float64), -own)
            updates *= scales.T[:, :, None].to(self.dtype).to(updates.device)
            found = torch.zeros_like(total[block])
            for i in range(count):
                # Not a matrix product: it may run in TF32 or bfloat16 by a global setting.
                row = (updates[i] * updates[i:]).sum(dim=-1).T.to(self.home).double()
                found[:, i, i:] = row
                found[:, i:, i] = row
            above = own - exponents[block]
            total[block] += _shifted(found, above[:, :, None] + above[:, None, :])
        return total.cpu(), exponents.cpu()

    def _exponents(self, updates: Tensor) -> Tensor:
        """Return e with 2^(e-1) <= max|dW_i| < 2^e, int64 `[rows, N]`, as far as it can be shifted by."""
        peaks = torch.linalg.vector_norm(updates, math.inf, dim=-1).T.to(self.home)
        limit = _LARGEST_SHIFT[self.dtype]
        # A zero update must not decide on the scale of its row.
        exponents = torch.where(peaks > 0, torch.frexp(peaks).exponent, -limit)
        return exponents.long().clamp(-limit, limit)


def _shifted(values: Tensor, exponents: Tensor) -> Tensor:
    """Return values * 2^exponents in float64, exactly; what falls below its range becomes 0."""
    # Two halves: a single power of two would leave the range before the product does.
    half = exponents // 2
    return values * _power_of_two(half) * _power_of_two(exponents - half)


def _power_of_two(exponents: Tensor) -> Tensor:
    # The bits of a float64: exp2 and pow may be off by one in the last place.
    exponents = exponents.clamp(-1023, 1023)
    bits = ((exponents + 1023) << 52).view(torch.float64)
    return torch.where(exponents > -1023, bits, torch.zeros_like(bits))
