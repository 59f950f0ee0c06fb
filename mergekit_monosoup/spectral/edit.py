"""The whole edit of one update: decompose, split, mix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from mergekit_monosoup.errors import ShapeMismatchError
from mergekit_monosoup.spectral.matrix import is_matrix_like, matrix_view
from mergekit_monosoup.spectral.mixing import Coefficients, Mixing, mixing_coefficients
from mergekit_monosoup.spectral.spectrum import Backend, decompose
from mergekit_monosoup.spectral.split import effective_rank, split_index
from mergekit_monosoup.spectral.update import MatrixUpdate


@dataclass(frozen=True)
class MatrixRecord:
    """What was found and done in one matrix: its rank r, the split and the coefficients."""

    rank: int
    k: int
    effective_rank: float
    coefficients: Coefficients
    backend: str


@dataclass(frozen=True)
class EditRecord:
    """What was found and done in one tensor; a stack of experts has one entry a matrix.

    The properties give the value of the matrix, and the mean over the matrices of a stack.
    Matrices without any update have no entry; an update of zero has no entries at all.
    """

    matrices: tuple[MatrixRecord, ...]

    def _mean(self, values: list[float]) -> float:
        return fmean(values) if values else math.nan

    @property
    def rank(self) -> int:
        """Largest possible rank r = min(rows, columns)."""
        return self.matrices[0].rank if self.matrices else 0

    @property
    def k(self) -> float:
        """Split index."""
        ks = [m.k for m in self.matrices]
        return ks[0] if len(ks) == 1 else self._mean([float(k) for k in ks])

    @property
    def effective_rank(self) -> float:
        """exp H of the spectrum."""
        return self._mean([m.effective_rank for m in self.matrices])

    @property
    def rho(self) -> float:
        """Spectral decay ratio (s_{k+1} / s_1)^2."""
        return self._mean([m.coefficients.rho for m in self.matrices])

    @property
    def cos_alpha(self) -> float:
        """Alignment ||dW_low||_F / ||dW||_F."""
        return self._mean([m.coefficients.cos_alpha for m in self.matrices])

    @property
    def energy_kept(self) -> float:
        """P_k, the share of the squared norm in the leading k directions."""
        return self._mean([m.coefficients.energy_kept for m in self.matrices])

    @property
    def lambda_low(self) -> float:
        """Factor of the low-energy part."""
        return self._mean([m.coefficients.lambda_low for m in self.matrices])

    @property
    def lambda_high(self) -> float:
        """Factor of the high-energy part."""
        return self._mean([m.coefficients.lambda_high for m in self.matrices])


@dataclass(frozen=True)
class EditOptions:
    """How an update is split and mixed, and how much of the result is added.

    Args:
        energy: R in (0, 1], or None for the effective rank.
        mixing: `monosoup` or one of the ablations.
        alpha: Wise-FT factor on the edited update.
        spectrum: how the spectrum is computed; see `spectrum.decompose`.
    """

    energy: float | None = None
    mixing: Mixing = "monosoup"
    alpha: float = 1.0
    spectrum: Backend = "auto"


@torch.no_grad()
def edit_weight(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float] = (1.0,),
    options: EditOptions = EditOptions(),
) -> tuple[Tensor, EditRecord]:
    """Return W0 + alpha (lambda_high dW_high + lambda_low dW_low), dW = sum_i w_i (W_i - W0).

    MonoSoup (arXiv 2602.09689, section 4) on the averaged update. Inputs are read in blocks; apart
    from the result, a few squares of the smaller side are held.

    Args:
        base: W0: linear `[out, in]`, convolution `[out, in, k, ...]` or stack of experts
            `[experts, out, in]`; any floating dtype.
        tuned: the W_i, in the shape, dtype and on the device of `base`.
        weights: w_i, summing to 1.
        options: split, mixing and factor.

    Returns:
        The weight in the shape and dtype of `base`, rounded once from float32 (float64 for
        float64), and the record.

    Raises:
        ShapeMismatchError: fewer than two axes.
        NonFiniteError: NaN or infinity in an input, or dW overflows.
    """
    _require_matrix(base)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    stacks = [matrix_view(t) for t in tuned]
    records = []
    for index, (w0, result) in enumerate(zip(matrix_view(base), matrix_view(out), strict=True)):
        update = MatrixUpdate(w0, [stack[index] for stack in stacks], weights)
        records.append(_edit_matrix(update, result, options))
    return out, EditRecord(tuple(r for r in records if r is not None))


@torch.no_grad()
def edit_update(
    dw: Tensor,
    *,
    energy: float | None = None,
    mixing: Mixing = "monosoup",
    spectrum: Backend = "auto",
) -> tuple[Tensor, EditRecord]:
    """Return the edited update lambda_high dW_high + lambda_low dW_low by itself.

    The split and the coefficients are MonoSoup's (arXiv 2602.09689, section 4): k from the effective
    rank, or from the energy threshold where `energy` is given.

    Args:
        dw: update of a linear weight `[out, in]`, a convolution `[out, in, k, ...]` or a stack of
            experts `[experts, out, in]`.
        energy: R in (0, 1], or None for the effective rank.
        mixing: `monosoup` or one of the ablations.
        spectrum: how the spectrum is computed; see `spectrum.decompose`.

    Returns:
        The edited update in the shape of `dw`, float32 (float64 for float64), and its record.

    Raises:
        ShapeMismatchError: fewer than two axes.
        NonFiniteError: NaN or infinity in `dw`.
    """
    _require_matrix(dw)
    dtype = torch.float64 if dw.dtype == torch.float64 else torch.float32
    out = torch.empty(dw.shape, dtype=dtype, device=dw.device)
    options = EditOptions(energy, mixing, spectrum=spectrum)
    records = [
        _edit_matrix(MatrixUpdate(None, [matrix]), result, options)
        for matrix, result in zip(matrix_view(dw), matrix_view(out), strict=True)
    ]
    return out, EditRecord(tuple(r for r in records if r is not None))


def _require_matrix(tensor: Tensor) -> None:
    if not is_matrix_like(tuple(tensor.shape)):
        raise ShapeMismatchError(
            f"a tensor of shape {tuple(tensor.shape)} is not a matrix; leave tensors with fewer than "
            "two axes or without entries unedited"
        )


def _edit_matrix(update: MatrixUpdate, out: Tensor, options: EditOptions) -> MatrixRecord | None:
    """Write base + alpha * edited update into `out` `[rows, columns]`; None without an update."""
    rank = min(out.shape)
    update = update.without_untouched_lines()
    if update.lines is not None:
        _copy_base(update, out)
    spectrum = decompose(update, options.energy, options.spectrum) if update.small else None
    if spectrum is None:
        _copy_base(update, out)
        return None
    values = spectrum.singular_values
    k = split_index(values, options.energy)
    c = mixing_coefficients(values, k, options.mixing)
    basis = None
    whole, part = c.lambda_high, 0.0
    if k < len(values) and c.lambda_high != c.lambda_low:
        basis, complement = spectrum.basis(k)
        basis = basis.to(update.dtype)
        # edited = whole * dW + part * dW B B^T, B on the side of the split that has fewer directions.
        whole = c.lambda_high if complement else c.lambda_low
        part = c.lambda_low - whole if complement else c.lambda_high - whole
    record = MatrixRecord(rank, k, effective_rank(values), c, spectrum.backend)
    del spectrum
    _apply(update, out, options.alpha * whole, options.alpha * part, basis)
    return record


def _copy_base(update: MatrixUpdate, out: Tensor) -> None:
    if update.base is None:
        out.zero_()
    else:
        out.copy_(update.base)


def _apply(update: MatrixUpdate, out: Tensor, whole: float, part: float, basis: Tensor | None) -> None:
    """Write base + whole * dW + part * dW basis basis^T, block by block."""
    for start, stop in update.spans():
        block = update.block(start, stop)
        value = block.delta * whole
        if block.base is not None:
            value += block.base
        if basis is not None:
            value.addmm_(block.delta @ basis, basis.T, alpha=part)
        update.write(out, start, stop, value)
