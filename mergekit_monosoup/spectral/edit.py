"""The whole edit of one update: decompose, split, mix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

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
from mergekit_monosoup.spectral.matrix import MatrixView, choose_view
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.precision import load_linear_algebra
from mergekit_monosoup.spectral.products import add_projection
from mergekit_monosoup.spectral.record import EditRecord, MatrixRecord
from mergekit_monosoup.spectral.spectrum import Backend, decompose
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split
from mergekit_monosoup.spectral.storing import NEAREST, Storage, sampled_lines, survived
from mergekit_monosoup.spectral.update import Block, MatrixUpdate

# Entries up to which each thread takes a matrix of a stack for itself, so that no thread waits for another,
# and entries of all of them: their scratch memory is up to three float32 copies.
_ONE_EACH, _ALL_AT_A_TIME = 1 << 22, 1 << 26


@dataclass(frozen=True)
class EditOptions:
    """How an update is split and mixed, how much of the result is added, and how that is stored.

    Args:
        split: the rule for k.
        mixing: `monosoup` or one of the ablations.
        alpha: Wise-FT factor on the edited update.
        spectrum: how the spectrum is computed; see `spectrum.decompose`.
        storage: how the weight is rounded.
    """

    split: Split = EFFECTIVE_RANK
    mixing: Mixing = "monosoup"
    alpha: float = 1.0
    spectrum: Backend = "auto"
    storage: Storage = NEAREST


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
    split: Split | None = None,
    mixing: Mixing = "monosoup",
    spectrum: Backend = "auto",
    view: MatrixView | None = None,
) -> tuple[Tensor, EditRecord]:
    """Return the edited update lambda_high dW_high + lambda_low dW_low by itself.

    The split and the coefficients are MonoSoup's (arXiv 2602.09689, section 4): k from the effective
    rank, or from the energy threshold where `energy` is given. DG-Hard (arXiv 2605.20296) is
    `split=Split("donoho_gavish"), mixing="high"`.

    Args:
        dw: update of a linear weight `[out, in]`, a convolution `[out, in, k, ...]` or a stack of
            experts `[experts, out, in]`.
        energy: R in (0, 1]; short for `split=Split(energy=R)`.
        split: the rule for k; absent, the effective rank.
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
    options = EditOptions(split or Split(energy=energy), mixing, spectrum=spectrum)
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
    load_linear_algebra(out.device)
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
            records += _edit_batch(w0, [t[part] for t in tuned], weights, out[part], options, part.start)
        return records
    by_svd = options.spectrum == "svd" or tuned[0].dtype == torch.float64
    with nullcontext() if by_svd else at_work(out.device, out.numel()):

        def edit(i: int) -> MatrixRecord | None:
            update = MatrixUpdate(None if base is None else base[i], [t[i] for t in tuned], weights)
            return _edit_matrix(update, out[i], options, i)

        most = min(_ONE_EACH, _ALL_AT_A_TIME // crew().size)
        one_each = len(out) >= crew().size and out[0].numel() <= most
        return crew().map(edit, range(len(out))) if one_each else [edit(i) for i in range(len(out))]


def _edit_batch(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
    options: EditOptions,
    first: int,
) -> list[MatrixRecord | None]:
    delta = stacked_update(base, tuned, weights)
    spectra = BatchedSpectra(delta)
    rank = min(out.shape[1:])
    shape = out.shape[1], out.shape[2]
    factors = torch.ones(len(out), rank, dtype=torch.float64, device="cpu")
    records: list[MatrixRecord | None] = []
    for i in range(len(out)):
        values = spectra.values(i)
        if float(values[0]) == 0 or not spectra.decides(i, options.split):
            records.append(None)
            continue
        record = MatrixRecord.of(values, shape, options.split, options.mixing, "gram64")
        c = record.coefficients
        factors[i, : record.k], factors[i, record.k :] = c.lambda_high, c.lambda_low
        records.append(record)
    edited = spectra.apply(delta, factors) * options.alpha
    if base is not None:
        edited += base.float()
    rounded = options.storage.rounded(edited, out.dtype, first * out[0].numel())
    out.copy_(rounded)
    if base is not None and len(tuned) == 1:
        lines = sampled_lines(shape[0], out[0].numel())
        for i, found in enumerate(records):
            if found is not None:
                w1 = tuned[0][i, lines].float()
                sums = options.storage.survival(out.dtype, edited[i, lines], rounded[i, lines], w1)
                left, intended = survived([sums])
                records[i] = replace(found, survived=left, intended=intended)
    for i, decided in enumerate(records):
        if decided is None:
            update = MatrixUpdate(None if base is None else base[i], [t[i] for t in tuned], weights)
            records[i] = _edit_matrix(update, out[i], options, first + i)
    return records


def _edit_matrix(update: MatrixUpdate, out: Tensor, options: EditOptions, index: int) -> MatrixRecord | None:
    """Write base + alpha * edited update into `out` `[rows, columns]`; None without an update.

    Args:
        update: the matrix.
        out: where the result goes.
        options: split, mixing, factor and storage.
        index: of the matrix in its stack.
    """
    update = update.without_untouched_lines()
    if update.lines is not None:
        _copy_base(update, out)
    spectrum = decompose(update, options.split, options.spectrum) if update.small else None
    if spectrum is None:
        _copy_base(update, out)
        return None
    values = spectrum.singular_values
    record = MatrixRecord.of(values, update.shape, options.split, options.mixing, spectrum.backend)
    k, c = record.k, record.coefficients
    basis = None
    whole, part = c.lambda_low if k == 0 else c.lambda_high, 0.0
    if 0 < k < len(values) and c.lambda_high != c.lambda_low:
        basis, complement = spectrum.basis(k)
        basis = basis.to(update.dtype)
        # edited = whole * dW + part * dW B B^T, B on the side of the split that has fewer directions.
        whole = c.lambda_high if complement else c.lambda_low
        part = c.lambda_low - whole if complement else c.lambda_high - whole
    del spectrum
    sums = _apply(
        update, out, options.alpha * whole, options.alpha * part, basis, options.storage, index * out.numel()
    )
    found, intended = survived(sums)
    return replace(record, survived=found, intended=intended)


def _copy_base(update: MatrixUpdate, out: Tensor) -> None:
    if update.base is None:
        out.zero_()
    else:
        out.copy_(update.base)


def _apply(
    update: MatrixUpdate,
    out: Tensor,
    whole: float,
    part: float,
    basis: Tensor | None,
    storage: Storage,
    first: int,
) -> list[Tensor]:
    """Write base + whole * dW + part * dW basis basis^T, block by block; return what survives of the edit.

    That is asked of one fine-tuned checkpoint alone: the average of several lies off the grid anyway.
    """
    measured = update.base is not None and len(update.tuned) == 1

    def write(span: tuple[int, int]) -> Tensor | None:
        block = update.block(*span)
        lines = sampled_lines(update.long, update.long * update.small, span[0])
        w1 = block.base[lines] + block.delta[lines] if measured and block.base is not None else None
        value = _edited_block(block, whole, part, basis)
        rounded = storage.rounded(value, out.dtype, first + span[0] * update.small)
        update.write(out, *span, rounded)
        if w1 is None or not len(w1):
            return None
        return storage.survival(out.dtype, value[lines], rounded[lines], w1)

    return [sums for sums in crew().map(write, update.spans()) if sums is not None]


def _edited_block(block: Block, whole: float, part: float, basis: Tensor | None) -> Tensor:
    base, delta = block.base, block.delta
    if base is None:
        value = delta * whole
    else:
        value = torch.add(base, delta, alpha=whole, out=base if block.base_is_copy else None)
    if basis is not None:
        add_projection(value, delta, basis, part)
    return value
