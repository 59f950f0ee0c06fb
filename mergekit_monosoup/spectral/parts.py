"""The two parts of an update, found once and put together as often as wished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergekit_monosoup.spectral.edit import EditOptions
from mergekit_monosoup.spectral.matrix import MatrixView
from mergekit_monosoup.spectral.mixing import Mixing, mix, mixing_coefficients
from mergekit_monosoup.spectral.products import add_projection
from mergekit_monosoup.spectral.spectrum import decompose
from mergekit_monosoup.spectral.update import MatrixUpdate

# Entries that are put together at a time: what is held of them stays in a core's cache.
_PIECE = 1 << 16


@dataclass(frozen=True)
class MatrixSplit:
    """What a split rule says of one matrix, whatever the mixing will be.

    `projected` says whether dW has two parts; else all of it is low (k = 0) or high. `complement` says that
    what was projected is the low part and not the high one.
    """

    k: int
    rho: float
    cos_alpha: float
    projected: bool
    complement: bool

    def factors(self, mixing: Mixing) -> tuple[float, float]:
        """Return a and b of the edited update a dW + b P, P being the part that was projected."""
        low, high = mix(self.rho, self.cos_alpha, mixing)
        if not self.projected or low == high:
            return (low if self.k == 0 else high), 0.0
        return (high, low - high) if self.complement else (low, high - low)


@dataclass(frozen=True)
class Parts:
    """The projected part P of a tensor's update, and the split of each of its matrices.

    P is `[matrices, rows, columns]` in the dtype of the computation, None where no matrix has two parts; a
    matrix without an update has no split.
    """

    projection: Tensor | None
    splits: tuple[MatrixSplit | None, ...]


class PartsStore(Protocol):
    """Keeps the parts of tensors."""

    def parts(self, tensor: str, rule: str, find: Callable[[], Parts]) -> Parts:
        """Return the parts of a tensor by a rule, from `find` where they are not kept yet.

        Args:
            tensor: its name.
            rule: all that the parts depend on beside the values, in words.
            find: finds them.
        """


@torch.no_grad()
def find_parts(
    base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], options: EditOptions, view: MatrixView
) -> Parts:
    """Split dW = sum_i w_i (W_i - W0) as `edit_weight` does.

    Args:
        base, tuned, weights, view: as `edit_weight` has them.
        options: split and spectrum count.

    Raises:
        NonFiniteError: NaN or infinity in an input, or dW overflows.
    """
    w0, ws = view.of(base), [view.of(t) for t in tuned]
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    projection = torch.zeros(w0.shape, dtype=dtype, device=base.device)
    splits = [
        _project(MatrixUpdate(w0[i], [w[i] for w in ws], weights), options, projection[i])
        for i in range(len(w0))
    ]
    found = any(split is not None and split.projected for split in splits)
    return Parts(projection if found else None, tuple(splits))


def _project(update: MatrixUpdate, options: EditOptions, out: Tensor) -> MatrixSplit | None:
    update = update.without_untouched_lines()
    spectrum = decompose(update, options.split, options.spectrum) if update.small else None
    if spectrum is None:
        return None
    values = spectrum.singular_values
    k = options.split.index(values, update.shape)
    c = mixing_coefficients(values, k, "monosoup")
    if not 0 < k < len(values):
        return MatrixSplit(k, c.rho, c.cos_alpha, projected=False, complement=False)
    basis, complement = spectrum.basis(k)
    basis = basis.to(update.dtype)
    for span in update.spans():
        delta = update.block(*span).delta
        part = torch.zeros_like(delta)
        add_projection(part, delta, basis, 1.0)
        update.write(out, *span, part)
    return MatrixSplit(k, c.rho, c.cos_alpha, projected=True, complement=complement)


@torch.no_grad()
def put_together(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    parts: Parts,
    options: EditOptions,
    view: MatrixView,
) -> Tensor:
    """Return W0 + alpha (lambda_high dW_high + lambda_low dW_low), rounded once, from parts already found.

    The same sums as in `edit_weight` in another order: before they are rounded, results differ by a few units
    in the last place of float32 (float64).

    Args:
        base, tuned, weights, view: as `edit_weight` has them.
        parts: of this tensor by the split of `options`.
        options: mixing and alpha count; rounding is to the nearest.
    """
    w0, ws = view.of(base), [view.of(t) for t in tuned]
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    result = view.of(out)
    for i, split in enumerate(parts.splits):
        if split is None:
            result[i].copy_(w0[i])
            continue
        whole, part = (options.alpha * factor for factor in split.factors(options.mixing))
        projection = None
        if parts.projection is not None and part:
            projection = parts.projection[i].to(base.device).reshape(-1)
        flat, stored = result[i].view(-1), w0[i].reshape(-1)
        others = [w[i].reshape(-1) for w in ws]
        for start in range(0, len(flat), _PIECE):
            piece = slice(start, start + _PIECE)
            value = stored[piece].to(dtype)
            delta: Tensor | None = None
            for other, weight in zip(others, weights, strict=True):
                update = other[piece].to(dtype, copy=True).sub_(value)
                update = update if weight == 1 else update.mul_(weight)
                delta = update if delta is None else delta.add_(update)
            if delta is None:
                raise ValueError("an update needs at least one fine-tuned tensor")
            edited = torch.add(value, delta, alpha=whole, out=delta)
            if projection is not None:
                edited.add_(projection[piece], alpha=part)
            flat[piece].copy_(edited)
    return out
