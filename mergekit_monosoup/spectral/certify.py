"""Whether eigenvalues of finite precision leave the split and the coefficients in no doubt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_monosoup.spectral.mixing import mixing_coefficients
from mergekit_monosoup.spectral.split import effective_rank, rank_index, split_index

# Error of the eigenvalues of a Gram matrix, in units of eps * lambda_1, as far as it matters here. A
# single eigenvalue may be off by 6, but the effects on the effective rank do not add up: for Gaussian,
# power-law, spiked and graded updates of 512 to 2048 columns the effective rank is off by at most a
# fifth of the sum that a unit error in every eigenvalue would give. Twice that sum is a margin of ten;
# tests/test_certify.py measures it.
_EIGENVALUE_ERROR = 2.0
# Largest uncertainty of lambda_low that is let through; a fifth of what is promised to the user.
_COEFFICIENT_ERROR = 2e-5


def eigenvalue_tolerance(largest: float, dtype: torch.dtype) -> float:
    """Return tau, the error ascribed to each eigenvalue of a Gram matrix formed and solved in `dtype`.

    Weyl: no eigenvalue moves by more than the norm of the perturbation, which for the product, the
    reduction to tridiagonal form and its solution together is a few eps lambda_1.
    """
    return _EIGENVALUE_ERROR * torch.finfo(dtype).eps * largest


def singular_value_errors(values: Tensor, tau: float) -> Tensor:
    """Return bounds on the errors of s_i = sqrt(lambda_i) when lambda_i is uncertain by tau.

    |sqrt(l + d) - sqrt(l)| <= |d| / max(sqrt(l), sqrt(|d|)): harmless for large singular values,
    sqrt(tau) for those that drown.
    """
    return tau / values.clamp(min=math.sqrt(tau)) if tau > 0 else torch.zeros_like(values)


def is_certain(values: Tensor, errors: Tensor, energy: float | None) -> bool:
    """Say whether k and the coefficients are the same for all spectra within the errors.

    For the effective rank, dH/ds_i = -(ln p_i + H) / sum_j s_j bounds the change of H to first
    order, term by term; for an energy threshold, the kept energies on both sides of k are compared
    with R.

    Args:
        values: singular values `[r]`, descending, float64.
        errors: bounds on their errors, same shape.
        energy: R, or None for the effective rank.
    """
    k = split_index(values, energy)
    squares = values.square()
    total = float(squares.sum())
    square_errors = errors * (2 * values + errors)
    doubt = float(square_errors[k:].sum()) / total
    if energy is None:
        if not _rank_is_certain(values, errors, k):
            return False
    else:
        kept = squares.cumsum(0) / total
        margin = float(square_errors[:k].sum()) / total
        below = float(kept[k - 2]) if k > 1 else 0.0
        if not (below + margin + doubt < energy <= float(kept[k - 1]) - margin - doubt):
            return False
    if k == len(values):
        return True
    cos_alpha = mixing_coefficients(values, k, "alignment").cos_alpha
    # d(cos^2) = doubt; near cos = 0 the root turns it into sqrt(doubt).
    cos_error = doubt / (cos_alpha + math.sqrt(doubt)) if doubt > 0 else 0.0
    rho_error = float(square_errors[k] + square_errors[0]) / float(squares[0])
    return cos_error + rho_error <= _COEFFICIENT_ERROR


def _rank_is_certain(values: Tensor, errors: Tensor, k: int) -> bool:
    total = float(values.sum())
    rank = effective_rank(values)
    entropy = math.log(rank)
    # A value below its error may be as large as the error, or zero.
    p = torch.maximum(values, errors) / total
    change = float((errors * (p.clamp(min=1e-300).log() + entropy).abs()).sum()) / total
    lowest = rank_index(rank * math.exp(-change), len(values))
    highest = rank_index(rank * math.exp(change), len(values))
    return lowest == k == highest
