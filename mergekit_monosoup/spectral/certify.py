"""Whether eigenvalues of finite precision leave the split and the coefficients in no doubt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_monosoup.spectral.mixing import mixing_coefficients
from mergekit_monosoup.spectral.split import Split, effective_rank, rank_index
from mergekit_monosoup.spectral.threshold import NoiseThreshold

# How far the eigenvalues of a Gram matrix formed in finite precision are off. Rounding of the product is
# independent from entry to entry, with a spread below eps times the largest diagonal entry; their common
# shift is below eps of the mean. The effect on the effective rank of Gaussian, power-law, spiked, graded,
# sparse, heavy-tailed and low-rank updates stays below a quarter of what is allowed for, where one direction
# holds nearly everything below a half; tests/test_certify.py measures it.
_SPREADS = 2.0
_SHIFT = 1.0
# A single value may be off by more spreads: where one direction holds nearly everything, its errors make a
# direction of their own. Leading values are also off by a few eps of themselves.
_SPREADS_OF_ONE = 8.0
_LEADING = 8.0
# How far q eigenvalues drowning in independent errors are spread, in an entry's error times sqrt(q).
_DROWNED = 1.0
# Householder's reduction in the dtype of the product errs, in the part of the spectrum that decides, like
# the geometric mean of the largest and the mean eigenvalue; half an eps of it is twice what was measured.
_REDUCTION = 0.5
# What a reduction in float32 has been seen to turn, in units of eps n (n / participation)^(1/4): 0.06 for
# sides of 1024, 0.03 for 4096.
_TURNED = 0.05
# Largest estimate of ||(P' - P) dW||_F / ||dW||_F, P' being mixed across the split by rounding. The
# estimate is on the safe side: the largest entry of the error is about a seventh of it, in max |dW|.
_SUBSPACE_ERROR = 1e-4
# The same where the result is rounded to 16 bits, in units of the rounding of W (relative to ||dW||): one
# entry in a thousand may be rounded to the other neighbour, and the error is a ninth of the estimate.
_HIDDEN_BY_ROUNDING = 5e-4
_LARGEST_SUBSPACE_ERROR = 1e-3
_PAIRED = 32
# Largest uncertainty of lambda_low that is let through; a third of what is promised to the user.
_COEFFICIENT_ERROR = 3e-5


@dataclass(frozen=True)
class Doubt:
    """What is not known of singular values s_1 >= ... >= s_q.

    `shift` `[q]` bounds errors of s_i that may all have the same sign; `spread` `[q]` is the standard
    deviation of errors that are independent of each other. Both in units of s. `relative` is what values
    may be off by in units of themselves, which matters to comparisons with single ones alone.
    """

    shift: Tensor
    spread: Tensor
    relative: float = 0.0


def product_error(dtype: torch.dtype, sections: float = 1) -> float:
    """Return the relative error of an entry of a Gram matrix, against the squared norms of its columns.

    Args:
        dtype: of the products and of the sums within a section.
        sections: independent sums that are added up in float64.
    """
    return float(torch.finfo(dtype).eps) / math.sqrt(sections)


def reduction_error(values: Tensor, diagonal: Tensor, dtype: torch.dtype) -> float:
    """Return the error that reducing a Gram matrix to tridiagonal form in `dtype` adds to each entry."""
    return _REDUCTION * float(torch.finfo(dtype).eps * values[0] * diagonal.mean().sqrt())


def expected_subspace_error(n: int, participation: float) -> float:
    """Return about what `subspace_error` will say after a reduction in float32 and a refinement.

    The reduction errs like sqrt(lambda_1 / mean), which is at most (n / participation)^(1/4), and directions
    that are n times closer turn n times as easily. Decides on time alone.

    Args:
        n: side of the Gram matrix.
        participation: (sum_i l_i)^2 / (n sum_i l_i^2) of its eigenvalues.
    """
    return float(_TURNED * torch.finfo(torch.float32).eps * n * (n / participation) ** 0.25)


def gram_doubt(values: Tensor, diagonal: Tensor, error: float, reduction: float = 0.0) -> Doubt:
    """Return what is not known of singular values found from a Gram matrix with errors.

    Args:
        values: roots of the eigenvalues, `[q]`, descending, float64.
        diagonal: squared norms of the columns, in units of `values` squared.
        error: of its entries, see `product_error`.
        reduction: see `reduction_error`.
    """
    # Twice the reduction's: with one direction far above all others its errors are not independent.
    entry = error * float(diagonal.max()) + 2 * reduction
    shift = root_error(values, _SHIFT * error * float(diagonal.mean()))
    # Eigenvalues that drown in the errors repel each other, and those below zero count as zero: they are
    # off in common.
    ascending = values.square().flip(0)
    count = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    drowned = (ascending < _DROWNED * entry * count.sqrt()).nonzero()
    if len(drowned):
        q = int(drowned[-1]) + 1
        shift[-q:] = root_error(values[-q:], _DROWNED * math.sqrt(q) * entry)
    reduced = reduction / (_REDUCTION * float(values[0] * diagonal.mean().sqrt()))
    return Doubt(shift, root_error(values, entry), _LEADING * (error + reduced))


def subspace_tolerance(hidden: float) -> float:
    """Return the largest error of the subspace that is let through, as `subspace_error` estimates it.

    Args:
        hidden: eps of the result's dtype times ||W0|| / ||dW||, 0 where the result is not rounded further.
    """
    return max(_SUBSPACE_ERROR, min(_LARGEST_SUBSPACE_ERROR, _HIDDEN_BY_ROUNDING * hidden))


def subspace_error(
    values: Tensor, diagonal: Tensor, error: float, k: int, reduction: float = 0.0, refined: int = 0
) -> float:
    """Return an estimate, on the safe side, of ||(P' - P) dW||_F / ||dW||_F for the leading subspace.

    A perturbation with entries e turns direction i into j by e / (l_i - l_j), and the projected update
    by s_i times that; over all pairs on different sides of the split, the sum of squares bounds
    ||(P' - P) dW||_F^2 to first order (Davis & Kahan, 1970). It is compared with `subspace_tolerance`.

    Args:
        values: singular values `[q]`, descending, float64.
        diagonal: squared norms of the columns, in units of `values` squared.
        error: of the entries of the Gram matrix, see `product_error`.
        k: the split.
        reduction: see `reduction_error`.
        refined: directions on each side of the split that become Ritz vectors in float64 afterwards.
    """
    if k in (0, len(values)):
        return 0.0
    squares = values.square()
    mean = float(diagonal.mean())
    entry = error * mean + reduction
    moved = _moved(squares[:k], squares[k:], entry)
    if refined:
        first, last = max(0, k - refined), k + refined
        near = squares[first:k], squares[k:last]
        moved -= _moved(*near, entry)
        # Rounding in float64, and to second order what both have in common with directions outside.
        outside = torch.cat([squares[:first], squares[last:]]) - (squares[k - 1] + squares[k]) / 2
        common = entry * float((entry / outside.abs().clamp(min=entry)).norm())
        moved += _moved(*near, product_error(torch.float64) * max(mean, float(squares[first])) + common)
    return math.sqrt(max(0.0, moved) / float(squares.sum()))


def _moved(leading: Tensor, others: Tensor, entry: float) -> float:
    total = 0.0
    # A few rows of all pairs at a time: the pairs are as many as the entries of the Gram matrix.
    for some in torch.split(leading, _PAIRED):
        gaps = some[:, None] - others
        turns = (entry / gaps.clamp(min=entry)).square()
        total += float((turns * (some[:, None] + others)).sum())
    return total


def root_error(values: Tensor, error: float) -> Tensor:
    """Return what an error of s^2 does to s at most."""
    # |sqrt(l + d) - sqrt(l)| <= |d| / max(sqrt(l), sqrt(|d|)).
    return error / values.clamp(min=math.sqrt(error))


def is_certain(values: Tensor, doubt: Doubt, split: Split, shape: tuple[int, int]) -> bool:
    """Say whether k is the same, and lambda_low the same to 3e-5, whatever the errors are.

    For the effective rank, dH/ds_i = -(ln p_i + H) / sum_j s_j carries the errors over to H, to first
    order; for an energy threshold, the kept energies on both sides of k are compared with R; for a noise
    threshold, the values on both sides of k with the ends of the interval that tau lies in.

    Args:
        values: singular values `[q]`, descending, float64.
        doubt: their errors.
        split: the rule.
        shape: of the matrix.
    """
    k = split.index(values, shape)
    squares = values.square()
    total = float(squares.sum())
    tail = _energy_error(values[k:], doubt.shift[k:], doubt.spread[k:]) / total
    threshold = split.threshold(*shape)
    if threshold is not None:
        if not _count_is_certain(values, doubt, threshold, k):
            return False
    elif split.energy is None:
        if not _rank_is_certain(values, doubt, k):
            return False
    else:
        kept = squares.cumsum(0) / total
        margin = tail + _energy_error(values[:k], doubt.shift[:k], doubt.spread[:k]) / total
        below = float(kept[k - 2]) if k > 1 else 0.0
        if not (below + margin < split.energy <= float(kept[k - 1]) - margin):
            return False
    if k in (0, len(values)):
        return True
    cos_alpha = mixing_coefficients(values, k, "alignment").cos_alpha
    # d(cos^2) = tail; near cos = 0 the root turns it into sqrt(tail).
    cos_error = tail / (2 * cos_alpha + math.sqrt(tail)) if tail > 0 else 0.0
    ends = _energy_error(values[[0, k]], doubt.shift[[0, k]], doubt.spread[[0, k]])
    return cos_error + ends / float(squares[0]) <= _COEFFICIENT_ERROR


def _count_is_certain(values: Tensor, doubt: Doubt, threshold: NoiseThreshold, k: int) -> bool:
    error = doubt.shift + _SPREADS_OF_ONE * doubt.spread + doubt.relative * values
    lowest, highest = (values - error).clamp(min=0), values + error
    above = k == 0 or float(lowest[k - 1]) > threshold.threshold(highest)
    below = k == len(values) or float(highest[k]) < threshold.threshold(lowest)
    return above and below


def _energy_error(values: Tensor, shift: Tensor, spread: Tensor) -> float:
    """Return the error of sum_i s_i^2: shifts add up, spreads add up in squares."""
    common = (shift * (2 * values + shift)).sum()
    independent = (spread * (2 * values + spread)).square().sum().sqrt()
    return float(common + _SPREADS * independent)


def _rank_is_certain(values: Tensor, doubt: Doubt, k: int) -> bool:
    total = float(values.sum())
    rank = effective_rank(values)
    # A value below its error may be as large as the error, or zero.
    p = torch.maximum(values, doubt.shift + doubt.spread) / total
    slope = (p.clamp(min=1e-300).log() + math.log(rank)) / total
    common = (slope * doubt.shift).abs().sum()
    independent = (slope * doubt.spread).square().sum().sqrt()
    change = float(common + _SPREADS * independent)
    lowest = rank_index(rank * math.exp(-change), len(values))
    highest = rank_index(rank * math.exp(change), len(values))
    return lowest == k == highest
