"""Turn what a merge method did with one tensor into its record."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_monosoup.report.rounding import storage_dtype, storage_noise
from mergekit_monosoup.report.schema import ZERO_UPDATE, Action, SpectrumCurve, TensorRecord
from mergekit_monosoup.spectral.analysis import spectrum_points
from mergekit_monosoup.spectral.record import EditRecord

# Entries that are widened at a time: on a processor, few enough for its cache.
_PIECE, _DEVICE_PIECE = 1 << 18, 1 << 26


def frobenius_norm(tensor: Tensor) -> float:
    """Return ||tensor||_F, in pieces: no copy of the tensor in a wider dtype is made."""
    return math.hypot(*(_norm(piece) for piece in _pieces(tensor)))


def _pieces(tensor: Tensor) -> list[Tensor]:
    flat = tensor.detach().reshape(-1)
    step = _PIECE if flat.device.type == "cpu" else _DEVICE_PIECE
    return [flat[start : start + step] for start in range(0, len(flat), step)]


def _norm(piece: Tensor) -> float:
    # Without a dtype, the norm of a bfloat16 tensor would be rounded to bfloat16.
    wide = torch.float64 if piece.dtype == torch.float64 else torch.float32
    norm = float(torch.linalg.vector_norm(piece, dtype=wide))
    if 1e-15 < norm < 1e15:
        return norm
    # Squares may have left the range of float32.
    return float(torch.linalg.vector_norm(piece, dtype=torch.float64))


def tensor_record(
    name: str,
    base: Tensor,
    others: Sequence[Tensor],
    *,
    action: Action,
    reason: str = "",
    weights: Sequence[float] | None = None,
    edit: EditRecord | None = None,
    update_norm: float | None = None,
    started: float | None = None,
    **known: Any,
) -> TensorRecord:
    """Return the record of one tensor.

    Args:
        name: of the output tensor.
        base, others: W0 and the fine-tuned tensors as they were stored.
        action, reason: what was done and why.
        weights: of the average, in the order of `others`; equal where absent.
        edit: record of the spectral edit, where there was one.
        update_norm: ||dW||_F of the (averaged) update before any edit; found where it is not given.
        started: `time.perf_counter()` when work on the tensor began.
        known: further fields of the record.
    """
    if update_norm is None:
        update_norm = edit.norm if edit is not None else _update_norm(base, others, weights)
    if edit is not None and not edit.matrices and not reason:
        reason = ZERO_UPDATE
    base_norm = frobenius_norm(base)
    stored = [storage_dtype(t) for t in (base, *others)]
    fields: dict[str, Any] = {
        "tensor": name,
        "shape": tuple(base.shape),
        "dtype": dtype_name(base.dtype),
        "action": action,
        "reason": reason,
        "stored_dtypes": tuple(dtype_name(dtype) for dtype in stored),
        "update_norm": update_norm,
        "relative_update": update_norm / base_norm if update_norm is not None and base_norm else None,
        "rounding_share": _rounding_share(base, others, weights, update_norm),
        **(edit_fields(edit) if edit is not None else {}),
        **known,
    }
    if started is not None:
        fields["seconds"] = round(time.perf_counter() - started, 6)
    return TensorRecord.model_validate(fields)


def edit_fields(edit: EditRecord) -> dict[str, Any]:
    """Return the fields of a record that a spectral edit fills."""
    if not edit.matrices:
        return {"matrices": 0}
    return {
        "backend": edit.matrices[0].backend,
        "matrices": len(edit.matrices),
        "r": edit.rank,
        "k": edit.k,
        "effective_rank": edit.effective_rank,
        "p_k": edit.energy_kept,
        "rho": edit.rho,
        "cos_alpha": edit.cos_alpha,
        "lambda_low": edit.lambda_low,
        "lambda_high": edit.lambda_high,
        "noise": edit.noise,
        "threshold": edit.threshold,
        "spectrum": spectrum_curve(edit.matrices[0].values),
    }


def spectrum_curve(values: Tensor | None) -> SpectrumCurve | None:
    """Return a spectrum as a report has it, to six digits; None where there is none.

    Args:
        values: `[r]`, descending; of a stack of experts, those of the first one stand for all.
    """
    if values is None:
        return None
    # Once: each figure read off an accelerator would wait for it.
    index, *curves = spectrum_points(values.cpu())
    value, energy = (tuple(float(f"{v:.6g}") for v in curve) for curve in curves)
    return SpectrumCurve(index=tuple(index), value=value, energy=energy)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as recipes spell it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def _update_norm(base: Tensor, others: Sequence[Tensor], weights: Sequence[float] | None) -> float:
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    shares = _shares(weights, len(others))
    pieces = zip(*(_pieces(t) for t in (base, *others)), strict=True)
    norms = []
    for w0, *tuned in pieces:
        mean = torch.zeros_like(w0, dtype=wide)
        for w1, share in zip(tuned, shares, strict=True):
            mean.add_(w1.to(wide) - w0.to(wide), alpha=share)
        norms.append(_norm(mean))
    return math.hypot(*norms)


def _rounding_share(
    base: Tensor, others: Sequence[Tensor], weights: Sequence[float] | None, update_norm: float | None
) -> float | None:
    """Return the norm of what rounding has added to the weighted mean of the updates, over their mean's."""
    if not update_norm:
        return None
    shares = _shares(weights, len(others))
    found = [(w, *storage_noise(base, tuned)) for w, tuned in zip(shares, others, strict=True) if w]
    known = [(w, noise, size) for w, noise, size in found if size]
    if not known:
        return None
    if len(found) == 1:
        # Of the same entries: what the sample is too rich or too poor in cancels.
        ((_, noise, size),) = known
        return math.sqrt(noise / size)
    return math.sqrt(math.fsum(w**2 * noise for w, noise, _ in known)) / update_norm


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count if count else []
    total = math.fsum(weights)
    return [w / total for w in weights]
