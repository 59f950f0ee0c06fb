"""Factors of an edited update, cut off at a rank: what of a full fine-tune fits into an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.record import MatrixRecord
from mergekit_monosoup.spectral.spectrum import decompose
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split
from mergekit_monosoup.spectral.update import MatrixUpdate


@dataclass(frozen=True)
class EditedSpectrum:
    """Singular values of an update and of its edit, in the order of the former.

    `values` and `edited` are `[q]`, float64: s_i, descending, and lambda_i s_i; `k` is the split index and
    `shape` that of the matrix.
    """

    values: Tensor
    edited: Tensor
    k: int
    shape: tuple[int, int]

    def above(self, floor: float) -> int:
        """Return how many singular values of the update lie above a floor."""
        return int((self.values > floor).sum())

    def rank_keeping(self, share: float, among: int) -> int:
        """Return the least rank that keeps a share of the edited energy of the first `among` directions."""
        energies = self.edited[:among].square().sort(descending=True).values.cumsum(0)
        if among == 0 or energies[-1] == 0:
            return 0
        return min(int((energies < share * energies[-1]).sum()) + 1, among)


@dataclass(frozen=True)
class TruncatedEdit:
    """dW* ~ left @ right with left `[rows, R]`, right `[R, columns]`, float32; R may be 0.

    `error` is ||dW* - left right||_F / ||dW*||_F by the values left out, 0 where nothing was; `norm` is
    ||dW*||_F and `spectrum` what the rank was chosen by.
    """

    left: Tensor
    right: Tensor
    record: MatrixRecord
    error: float
    norm: float
    spectrum: EditedSpectrum


@torch.no_grad()
def truncated_edit(
    dw: Tensor,
    rank: Callable[[EditedSpectrum], int],
    *,
    split: Split = EFFECTIVE_RANK,
    mixing: Mixing | None = "monosoup",
    alpha: float = 1.0,
) -> TruncatedEdit | None:
    """Return the best factors of a rank of alpha (lambda_high dW_high + lambda_low dW_low).

    The edit keeps the singular directions and changes their values, so the leading ones of the result are
    those with the largest lambda_i s_i (Eckart & Young). Each value is shared evenly by the two factors.

    Args:
        dw: `[rows, columns]`, evaluated in float64.
        rank: gives R from the spectrum.
        split, mixing: as `edit_update` has them; mixing None leaves the update as it is.
        alpha: factor on the result.

    Returns:
        None where the update is zero.

    Raises:
        NonFiniteError: NaN or infinity in `dw`.
    """
    update = MatrixUpdate(None, [dw.double()])
    spectrum = decompose(update, split, "gram")
    if spectrum is None:
        return None
    values = spectrum.singular_values
    record = MatrixRecord.of(values, spectrum.shape, split, mixing or "monosoup", spectrum.backend)
    c = record.coefficients
    factors = torch.full_like(values, alpha)
    if mixing is not None:
        factors[: record.k] *= c.lambda_high
        factors[record.k :] *= c.lambda_low
    edited = EditedSpectrum(values, factors * values, record.k, spectrum.shape)
    kept = min(rank(edited), len(values))
    order = edited.edited.argsort(descending=True, stable=True)[:kept].sort().values
    chosen = edited.edited[order]
    # Runs of neighbours: only those vectors are computed that are asked for.
    low = int((order < record.k).sum())
    runs = [spectrum.directions(0, low)] if low else []
    if low < kept:
        first = int(order[low])
        runs.append(spectrum.directions(first, first + kept - low))
    directions = torch.cat(runs, 1) if runs else dw.new_zeros(update.small, 0, dtype=torch.float64)
    directions = directions.double()
    roots = chosen.sqrt()
    delta = update.block(0, update.long, dtype=torch.float64).delta
    # dW v_i = s_i u_i, of which the edit makes lambda_i s_i u_i.
    long = (delta @ directions) * (factors[order] / roots.clamp(min=torch.finfo(torch.float64).tiny))
    small = directions * roots
    left, right = (long, small.T) if update.long_axis == 0 else (small, long.T)
    total = float(edited.edited.square().sum())
    lost = max(total - float(chosen.square().sum()), 0.0)
    if kept < len(values):
        # Summed itself where something is left: the difference would cancel.
        out = torch.ones_like(values, dtype=torch.bool)
        out[order] = False
        lost = float(edited.edited[out].square().sum())
    return TruncatedEdit(
        left.float().contiguous(),
        right.float().contiguous(),
        record,
        math.sqrt(lost / total) if total else 0.0,
        math.sqrt(total),
        edited,
    )
