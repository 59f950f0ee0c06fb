"""The whole edit of one update: decompose, split, mix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from mergekit_monosoup.errors import ShapeMismatchError
from mergekit_monosoup.spectral.batch import (
    LARGEST_SMALL_SIDE,
    BatchedSpectra,
    batches,
    stacked_update,
)
from mergekit_monosoup.spectral.crew import at_work, crew
from mergekit_monosoup.spectral.matrix import MatrixView, ViewKind, choose_view
from mergekit_monosoup.spectral.mixing import Coefficients, Mixing, mixing_coefficients
from mergekit_monosoup.spectral.products import add_projection
from mergekit_monosoup.spectral.spectrum import Backend, decompose
from mergekit_monosoup.spectral.split import effective_rank, split_index
from mergekit_monosoup.spectral.update import Block, MatrixUpdate

# Entries up to which each thread takes a matrix of a stack for itself, so that no thread waits for another,
# and entries of all of them: their scratch memory is up to three float32 copies.
_ONE_EACH, _ALL_AT_A_TIME = 1 << 22, 1 << 26


@dataclass(frozen=True)
class MatrixRecord:
    """What was found and done in one matrix: its rank r, the split, the coefficients and ||dW||_F."""

    rank: int
    k: int
    effective_rank: float
    coefficients: Coefficients
    backend: str
    norm: float


@dataclass(frozen=True)
class EditRecord:
    """What was found and done in one tensor; a stack of experts has one entry a matrix.

    The properties give the value of the matrix, and the mean over the matrices of a stack.
    Matrices without any update have no entry; an update of zero has no entries at all.
    `view` says how the tensor was read as matrices.
    """

    matrices: tuple[MatrixRecord, ...]
    view: ViewKind = "matrix"

    def _mean(self, values: list[float]) -> float:
        return fmean(values) if values else math.nan

    @property
    def rank(self) -> int:
        """Largest possible rank r = min(rows, columns)."""
        return self.matrices[0].rank if self.matrices else 0

    @property
    def norm(self) -> float:
        """||dW||_F of the whole tensor."""
        return math.hypot(*(m.norm for m in self.matrices))

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
    view: MatrixView | None = None,
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
        view: how the tensors are read as matrices; by their shape alone where absent.

    Returns:
        The weight in the shape and dtype of `base`, rounded once from float32 (float64 for
        float64), and the record.

    Raises:
        ShapeMismatchError: fewer than two axes.
        NonFiniteError: NaN or infinity in an input, or dW overflows.
    """
    view = _required_view(base, view)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    records = _edit_stack(view.of(base), [view.of(t) for t in tuned], weights, view.of(out), options)
    return out, EditRecord(tuple(r for r in records if r is not None), view.kind)


@torch.no_grad()
def edit_update(
    dw: Tensor,
    *,
    energy: float | None = None,
    mixing: Mixing = "monosoup",
    spectrum: Backend = "auto",
    view: MatrixView | None = None,
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
        view: how `dw` is read as matrices; by its shape alone where absent.

    Returns:
        The edited update in the shape of `dw`, float32 (float64 for float64), and its record.

    Raises:
        ShapeMismatchError: fewer than two axes.
        NonFiniteError: NaN or infinity in `dw`.
    """
    view = _required_view(dw, view)
    dtype = torch.float64 if dw.dtype == torch.float64 else torch.float32
    out = torch.empty(dw.shape, dtype=dtype, device=dw.device)
    options = EditOptions(energy, mixing, spectrum=spectrum)
    records = _edit_stack(None, [view.of(dw)], (1.0,), view.of(out), options)
    return out, EditRecord(tuple(r for r in records if r is not None), view.kind)


def _required_view(tensor: Tensor, view: MatrixView | None) -> MatrixView:
    view = view or choose_view(tuple(tensor.shape))
    if not view.decomposes:
        raise ShapeMismatchError(
            f"a tensor of shape {tuple(tensor.shape)} is not a matrix; leave tensors with fewer than "
            "two axes or without entries unedited"
        )
    return view


def _edit_stack(
    base: Tensor | None, tuned: Sequence[Tensor], weights: Sequence[float], out: Tensor, options: EditOptions
) -> list[MatrixRecord | None]:
    """Edit a stack `[matrices, rows, columns]` into `out`: small matrices in batches, others in turn."""
    batched = (
        len(out) > 1
        and min(out.shape[1:]) <= LARGEST_SMALL_SIDE
        and options.spectrum != "svd"
        and all(t.dtype != torch.float64 for t in tuned)
    )
    if batched:
        records: list[MatrixRecord | None] = []
        for part in batches((out.shape[0], out.shape[1], out.shape[2]), out.device):
            w0 = None if base is None else base[part]
            records += _edit_batch(w0, [t[part] for t in tuned], weights, out[part], options)
        return records
    by_svd = options.spectrum == "svd" or tuned[0].dtype == torch.float64
    with nullcontext() if by_svd else at_work(out.device, out.numel()):

        def edit(i: int) -> MatrixRecord | None:
            update = MatrixUpdate(None if base is None else base[i], [t[i] for t in tuned], weights)
            return _edit_matrix(update, out[i], options)

        most = min(_ONE_EACH, _ALL_AT_A_TIME // crew().size)
        one_each = len(out) >= crew().size and out[0].numel() <= most
        return crew().map(edit, range(len(out))) if one_each else [edit(i) for i in range(len(out))]


def _edit_batch(
    base: Tensor | None, tuned: Sequence[Tensor], weights: Sequence[float], out: Tensor, options: EditOptions
) -> list[MatrixRecord | None]:
    delta = stacked_update(base, tuned, weights)
    spectra = BatchedSpectra(delta)
    rank = min(out.shape[1:])
    factors = torch.ones(len(out), rank, dtype=torch.float64)
    records: list[MatrixRecord | None] = []
    for i in range(len(out)):
        values = spectra.values(i)
        found = spectra.split(i, options.energy, options.mixing) if float(values[0]) > 0 else None
        if found is None:
            records.append(None)
            continue
        k, effective, c = found
        factors[i, :k], factors[i, k:] = c.lambda_high, c.lambda_low
        records.append(MatrixRecord(rank, k, effective, c, "gram64", float(values.norm())))
    edited = spectra.apply(delta, factors) * options.alpha
    out.copy_(edited if base is None else edited + base.float())
    for i, record in enumerate(records):
        if record is None:
            update = MatrixUpdate(None if base is None else base[i], [t[i] for t in tuned], weights)
            records[i] = _edit_matrix(update, out[i], options)
    return records


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
    norm = float(values.norm())
    record = MatrixRecord(rank, k, effective_rank(values), c, spectrum.backend, norm)
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

    def write(span: tuple[int, int]) -> None:
        update.write(out, *span, _edited_block(update.block(*span), whole, part, basis))

    crew().map(write, update.spans())


def _edited_block(block: Block, whole: float, part: float, basis: Tensor | None) -> Tensor:
    base, delta = block.base, block.delta
    if base is None:
        value = delta * whole
    else:
        value = torch.add(base, delta, alpha=whole, out=base if block.base_is_copy else None)
    if basis is not None:
        add_projection(value, delta, basis, part)
    return value
