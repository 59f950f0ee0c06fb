"""The edit of a low-rank update, from its factors alone.

dW = c B A is never formed. With B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of
the small core R_B R_A^T, and its singular vectors are Q_B U and Q_A V. Both R come from the r x r Gram
matrices in float64, where squaring costs none of the digits that float32, bfloat16 or float16 hold,
and where a matrix product does the work of a QR at a small part of its time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError, ParameterError, ShapeMismatchError
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.precision import load_linear_algebra
from mergekit_monosoup.spectral.record import EditRecord, MatrixRecord
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split, energy_rank

# Squared relative size below which a direction of a Gram matrix is rounding: float64 resolves 2e-16 of
# the largest, and the sums over up to 1e5 rows cost a little more.
_GRAM_FLOOR = 1e-14
# Singular values below this part of the largest are rounding of float32 factors.
_RANK_FLOOR = 2.0**-24


@dataclass(frozen=True)
class LowRankUpdate:
    """dW = scaling * left @ right, one product for each matrix of a stack.

    `left` is `[matrices, rows, r]`, `right` is `[matrices, r, columns]`, both as they were stored;
    `shape` is that of the weight, which has matrices * rows * columns entries.
    """

    left: Tensor
    right: Tensor
    scaling: float
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if len(left) != 3 or len(right) != 3 or left[0] != right[0] or left[2] != right[1]:
            raise ShapeMismatchError(f"factors of shapes {left} and {right} do not multiply")
        if math.prod(self.shape) != left[0] * left[1] * right[2]:
            raise ShapeMismatchError(
                f"factors of shapes {left} and {right} do not give a weight of shape {self.shape}"
            )

    @property
    def rank(self) -> int:
        """Number of columns r of `left`."""
        return self.left.shape[2]

    def materialise(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Return dW in the shape of the weight, computed in `dtype` on `device` (that of the factors)."""
        dw = torch.bmm(self.left.to(device, dtype), self.right.to(device, dtype))
        return dw.mul_(self.scaling).reshape(self.shape)


@dataclass(frozen=True)
class Core:
    """One matrix in terms of its factors: left @ right = (left @ u) diag(values) (right^T @ v)^T.

    `values` is `[q]`, descending, q the numerical rank; `u` and `v` are `[r, q]` and turn the columns of
    `left` and of `right^T` into orthonormal singular vectors; `project` is `[q, r]` with
    left = (left @ u) @ project. All in float64, without the scaling.
    """

    values: Tensor
    u: Tensor
    v: Tensor
    project: Tensor


def core_of(left: Tensor, right: Tensor) -> Core:
    """Return the spectrum of left @ right through r x r matrices.

    Args:
        left: `[rows, r]`; right: `[r, columns]`; any floating dtype, evaluated in float64.

    Raises:
        NonFiniteError: NaN or infinity in a factor.
    """
    load_linear_algebra(left.device)
    left, right = left.double(), right.double()
    gram_left, gram_right = left.mT @ left, right @ right.mT
    if not bool(torch.isfinite(gram_left).all() & torch.isfinite(gram_right).all()):
        raise NonFiniteError("a factor holds NaN or infinity")
    # left t^-1 and t right have columns and rows of equal norms: one rank direction may be large in one
    # factor and small in the other without being rounding.
    norms_left, norms_right = gram_left.diagonal().sqrt(), gram_right.diagonal().sqrt()
    alive = (norms_left > 0) & (norms_right > 0)
    t = torch.where(alive, (norms_left / norms_right.where(alive, norms_left.new_ones(()))).sqrt(), 1.0)
    t = torch.where(t > 0, t, 1.0)
    root_left, inverse_left = _root(gram_left / (t[:, None] * t))
    root_right, inverse_right = _root(gram_right * (t[:, None] * t))
    u, values, vt = torch.linalg.svd(root_left @ root_right.mT, full_matrices=False)
    keep = values > values[:1] * _RANK_FLOOR
    values, u, vt = values[keep], u[:, keep], vt[keep]
    return Core(
        values,
        (inverse_left @ u) / t[:, None],
        (inverse_right @ vt.mT) * t[:, None],
        (u.mT @ root_left) * t,
    )


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return F with F^T F = gram and its pseudo-inverse, `[q, r]` and `[r, q]`."""
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[-1:] * _GRAM_FLOOR
    roots, vectors = values[keep].sqrt(), vectors[:, keep]
    return vectors.mT * roots[:, None], vectors / roots


def edit_factors(
    update: LowRankUpdate, *, split: Split = EFFECTIVE_RANK, mixing: Mixing = "monosoup"
) -> tuple[LowRankUpdate, EditRecord]:
    """Edit a low-rank update: lambda_high dW_high + lambda_low dW_low, as factors of the same rank.

    The formulas are those of `spectral.edit_update` (arXiv 2602.09689, section 4) on the non-zero
    singular values; r is the rank of the factors, so that k = r means that nothing is left over. A noise
    threshold counts the other singular values, which are zero, as well: unless the rank of the factors is
    half that of the matrix or more, it finds no noise and k is the rank. The edit goes into `left`: `right`
    stays as it is.

    Args:
        update: factors of any floating dtype.
        split: the rule for k.
        mixing: `monosoup` or one of the ablations.

    Returns:
        The edited update, its `left` in float32 (float64 for float64), and the record.

    Raises:
        NonFiniteError: NaN or infinity in a factor.
    """
    dtype = torch.float64 if update.left.dtype == torch.float64 else torch.float32
    edited = torch.zeros(update.left.shape, dtype=dtype, device=update.left.device)
    records = []
    for i in range(update.left.shape[0]):
        core = core_of(update.left[i], update.right[i])
        if len(core.values) == 0:
            continue
        shape = update.left.shape[1], update.right.shape[2]
        record = MatrixRecord.of(core.values, shape, split, mixing, "factors", abs(update.scaling))
        c, k = record.coefficients, record.k
        if 0 < k < len(core.values) and c.lambda_high != c.lambda_low:
            m = (c.lambda_high - c.lambda_low) * (core.u[:, :k] @ core.project[:k])
            m.diagonal().add_(c.lambda_low)
            edited[i] = update.left[i].double() @ m
        else:
            edited[i] = update.left[i].to(dtype) * (c.lambda_low if k == 0 else c.lambda_high)
        records.append(record)
    result = LowRankUpdate(edited, update.right, update.scaling, update.shape)
    return result, EditRecord(tuple(records))


def mean_of(
    updates: Sequence[LowRankUpdate], weights: Sequence[float], scaling: float = 1.0
) -> LowRankUpdate:
    """Return sum_i w_i dW_i as one low-rank update: factors side by side, ranks added.

    Args:
        updates: of one weight, so of equal `shape` and equal numbers of matrices, rows and columns.
        weights: one factor for each; they are not normalised here.
        scaling: the scaling of the result, not zero.

    Raises:
        ShapeMismatchError: the updates are not of one weight.
    """
    first = updates[0]
    for other in updates[1:]:
        if other.shape != first.shape or other.left.shape[:2] != first.left.shape[:2]:
            raise ShapeMismatchError(f"updates of shapes {first.shape} and {other.shape} cannot be averaged")
    if len(updates) == 1 and weights[0] * first.scaling == scaling:
        return first
    dtype = torch.float64 if any(u.left.dtype == torch.float64 for u in updates) else torch.float32
    left = [u.left.to(dtype) * (w * u.scaling / scaling) for u, w in zip(updates, weights, strict=True)]
    right = [u.right.to(dtype) for u in updates]
    return LowRankUpdate(torch.cat(left, 2), torch.cat(right, 1), scaling, first.shape)


def rank_for(update: LowRankUpdate, rank: int | float) -> int:
    """Return the rank that a request stands for: itself, or the smallest one that keeps an energy.

    Args:
        update: the update to be stored.
        rank: an integer >= 1, or a share of the energy in (0, 1).
    """
    if isinstance(rank, int):
        if rank < 1:
            raise ParameterError(f"rank is {rank}; it must be at least 1")
        return rank
    values = [core_of(left, right).values for left, right in zip(update.left, update.right, strict=True)]
    return max((energy_rank(v, rank) for v in values if len(v)), default=1)


def truncate(update: LowRankUpdate, rank: int) -> tuple[LowRankUpdate, float]:
    """Return the best approximation of a given rank, and its relative error in Frobenius norm.

    Each singular value is shared evenly by the two factors (Eckart & Young: the leading `rank` triplets).
    Directions that the update does not have are zeros.

    Args:
        update: factors of any floating dtype.
        rank: number of columns of the new `left`, >= 1.

    Returns:
        The truncated update in float32 (float64 for float64) with the same scaling, and
        ||dW - dW_rank||_F / ||dW||_F, 0 for an update of zero.
    """
    matrices, rows, _ = update.left.shape
    dtype = torch.float64 if update.left.dtype == torch.float64 else torch.float32
    left = torch.zeros(matrices, rows, rank, dtype=dtype, device=update.left.device)
    right = torch.zeros(matrices, rank, update.right.shape[2], dtype=dtype, device=update.left.device)
    lost = total = 0.0
    for i in range(matrices):
        core = core_of(update.left[i], update.right[i])
        q = min(rank, len(core.values))
        roots = core.values[:q].sqrt()
        left[i, :, :q] = update.left[i].double() @ (core.u[:, :q] * roots)
        right[i, :q] = (core.v[:, :q] * roots).mT @ update.right[i].double()
        lost += float(core.values[q:].square().sum())
        total += float(core.values.square().sum())
    error = math.sqrt(lost / total) if total else 0.0
    return LowRankUpdate(left, right, update.scaling, update.shape), error
