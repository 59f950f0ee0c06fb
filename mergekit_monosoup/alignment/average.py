"""The average of several checkpoints, drawn towards the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_monosoup.alignment.inner import Updates
from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.spectral.storing import NEAREST, Storage


def towards_average(
    base: Tensor, finetuned: Sequence[Tensor], shares: Tensor, storage: Storage = NEAREST
) -> Tensor:
    """Return W0 + t mean(W_i - W0), block by block, with no whole tensor besides the result.

    Args:
        base: W0, of any floating dtype and any shape.
        finetuned: the tensors W_i, of the same shape.
        shares: t, `[rows]`: one for each row of the tensors read as `[rows, entries]`.
        storage: how the result is rounded.

    Returns:
        The shape and dtype of the base; computed in float32 (float64 if any input is), rounded once.

    Raises:
        NonFiniteError: an update holds NaN or infinity, or overflows.
    """
    result = torch.empty_like(base, memory_format=torch.contiguous_format)
    if base.numel() == 0:
        return result
    updates = Updates(base, finetuned, len(shares))
    shares = shares.to(updates.dtype).to(base.device)
    view = result.view(len(shares), -1)
    for (rows, columns), start, block in updates.blocks():
        dw = block.sum(dim=0).div_(len(finetuned))
        low, high = torch.aminmax(dw)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteError("an update holds NaN or infinity, or overflows its dtype")
        value = dw.mul_(shares[rows, None]).add_(start)
        # A block is whole rows, or a part of one.
        view[rows, columns] = storage.rounded(value, result.dtype, rows.start * view.shape[1] + columns.start)
    return result
