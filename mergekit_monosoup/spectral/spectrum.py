"""Singular values of an update and a basis of the subspace on one side of the split.

Neither V nor a full SVD is needed: the smaller Gram matrix has the singular values as roots of its
eigenvalues, and its eigenvectors span the leading subspace and its complement. Products in float32 are
enough for most updates; `certify` decides afterwards, and float64 or an SVD takes over where they are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.spectral.certify import (
    Doubt,
    expected_subspace_error,
    gram_doubt,
    is_certain,
    product_error,
    reduction_error,
    subspace_error,
    subspace_tolerance,
)
from mergekit_monosoup.spectral.crew import crew, torch_threads
from mergekit_monosoup.spectral.eigen import DenseEigen, VectorSource, by_tridiagonal_form, decomposed
from mergekit_monosoup.spectral.precision import full_float32
from mergekit_monosoup.spectral.products import GramSum
from mergekit_monosoup.spectral.sample import numerical_rank, sample
from mergekit_monosoup.spectral.sources import Known, Refined, Rotated, among_all
from mergekit_monosoup.spectral.split import split_index
from mergekit_monosoup.spectral.update import MatrixUpdate

Backend = Literal["auto", "gram", "svd"]

# Sums of squares outside this range are formed again from scaled entries.
_SAFE = {torch.float32: (1e-28, 1e34), torch.float64: (1e-280, 1e280)}
# Participation ratio from which a spectrum is flat enough for float32 to reduce the Gram matrix to
# tridiagonal form. Where it is not, the result must be rounded so coarsely that the error is hidden.
_FLAT = 0.1
# Ratio of the sides from which the smallest singular values are well above zero, unless the spectrum is
# steep. In a square matrix some drown in a float32 reduction, and k is in doubt every other time.
_OBLONG = 1.25
# Ratio from which products take so much longer that a float64 reduction does not count.
_LONG = 8
# Blocks that each thread converts before all of them multiply: waiting for each other costs time. More than a
# few are no more than a quarter of the matrix.
_BLOCKS_EACH, _FEW_BLOCKS = 2, 4
# Numerical rank, as a share of the smaller side, up to which an update is treated through a factor.
_LOW_RANK = 1 / 8


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one matrix, seen from its smaller side.

    `singular_values` is `[q]`, descending, float64 on the CPU; q is the number of columns of the
    smaller side that the update touches, all further singular values are zero. `backend` says how
    they were obtained: `gram32`, `gram64` (precision of the products), `factor` (low numerical rank) or
    `svd`; `certain` whether split, coefficients and subspace are beyond doubt.
    """

    singular_values: Tensor
    backend: str
    certain: bool
    _eigen: VectorSource
    _live: Tensor

    def basis(self, k: int) -> tuple[Tensor, bool]:
        """Return an orthonormal basis on one side of the split, whichever is smaller.

        Returns:
            `[small, c]` on the device of the update, and whether it spans the complement (singular
            directions beyond k) rather than the leading k.
        """
        q = len(self.singular_values)
        # Where directions were left out as noise, they belong to the low side: only the leading side
        # is known in full.
        complement = q == int(self._live.sum()) and q - k < k
        part = self._eigen.vectors(0, q - k) if complement else self._eigen.vectors(q - k, q)
        return among_all(part, self._live), complement


def decompose(
    update: MatrixUpdate, energy: float | None = None, backend: Backend = "auto"
) -> Spectrum | None:
    """Return the spectrum of an update, precise enough for the split at `energy`; None if it is zero.

    Args:
        update: the matrix.
        energy: R of the split that is going to be made, None for the effective rank.
        backend: `gram` goes as far as float64; `auto` goes on to the SVD where that is in doubt and
            starts with it for float64 inputs; `svd` is the yardstick, in float64.

    Raises:
        NonFiniteError: NaN or infinity in the update.
    """
    if backend == "svd" or (backend == "auto" and update.dtype == torch.float64):
        return _by_svd(update)
    with full_float32(update.device):
        found, in_float32 = _from_a_sample(update, energy)
        if found is not None:
            return found
        if in_float32:
            first = _by_gram(update, torch.float32, energy)
            if first is None or first.certain:
                return first
            q = numerical_rank(first.singular_values)
            if 0 < q <= _LOW_RANK * update.small:
                factored = _by_factor(update, first.basis(q)[0].double(), energy)
                if factored is not None:
                    return factored
            del first
        second = _by_gram(update, torch.float64, energy)
    if second is None or second.certain or backend == "gram":
        return second
    return _by_svd(update)


def _from_a_sample(update: MatrixUpdate, energy: float | None) -> tuple[Spectrum | None, bool]:
    """Return the spectrum if a few lines give it away, and whether products in float32 are worth a try.

    Only updates stored in more than 16 bits are looked at: the others carry the noise of their rounding,
    which makes their rank full and lifts their small singular values above the errors of float32.
    """
    if update.dtype != torch.float32:
        return None, False
    looked = None if update.tuned[0].dtype.itemsize <= 2 else sample(update)
    if looked is None:
        return None, True
    q = looked.numerical_rank
    if q <= min(_LOW_RANK * update.small, len(looked.values) / 2):
        return _by_factor(update, looked.directions(q), energy), True
    # The small values of a steep spectrum would be in doubt, and the work done twice.
    return None, looked.participation > _FLAT


def _by_gram(update: MatrixUpdate, dtype: torch.dtype, energy: float | None) -> Spectrum | None:
    scale = 1.0
    gram = _accumulated(update, dtype, scale)
    low, high = _SAFE[dtype]
    # NaN fails the comparison as well: inputs are looked at again only when something is wrong.
    if not low < float(gram.diagonal().max()) < high:
        peak = _finite_peak(update)
        if peak == 0:
            return None
        scale = _scale_for(peak, dtype)
        gram = _accumulated(update, dtype, scale)
    diagonal = gram.diagonal()
    live = diagonal > 0
    diagonal = diagonal[live]
    hidden = update.hidden_by_rounding(math.sqrt(float(diagonal.sum())) / scale)
    single = (
        dtype == torch.float32
        and by_tridiagonal_form(int(live.sum()), update.device)
        and _float32_reduces(update, gram.participation(), hidden)
    )
    reduced = torch.float32 if single else torch.float64
    total = gram.take(reduced)
    # Sums of several sections that are rounded to float32 in the end are as good as one section.
    error = product_error(dtype, 1 if single else gram.sections)
    if not bool(live.all()):
        kept = live.to(total.device)
        total = total[kept][:, kept].contiguous()
    eigen = decomposed(total)
    del total
    values = eigen.values.flip(0).clamp(min=0).sqrt()
    reduction = reduction_error(values, diagonal, reduced)
    certain = is_certain(values, gram_doubt(values, diagonal, error, reduction), energy)
    source: VectorSource = eigen
    if certain:
        k, tolerance = split_index(values, energy), subspace_tolerance(hidden)
        if subspace_error(values, diagonal, error, k, reduction) > tolerance:
            refined = Refined(eigen, update, live, scale, len(values) - k, len(values))
            certain = subspace_error(values, diagonal, error, k, reduction, refined.width) <= tolerance
            source = refined if certain else eigen
    name = "gram32" if dtype == torch.float32 else "gram64"
    return Spectrum(values / scale, name, certain, source, live)


def _float32_reduces(update: MatrixUpdate, participation: float, hidden: float) -> bool:
    """Say whether float32 may be expected to do for the reduction of the Gram matrix to tridiagonal form."""
    if participation > _FLAT:
        return True
    oblong = _OBLONG <= update.long / update.small <= _LONG
    return oblong and expected_subspace_error(update.small, participation) <= subspace_tolerance(hidden)


def _accumulated(update: MatrixUpdate, dtype: torch.dtype, scale: float) -> GramSum:
    def scaled(span: tuple[int, int]) -> Tensor:
        delta = update.block(*span, dtype=dtype).delta
        return delta if scale == 1 else delta * scale

    gram = GramSum(update.small, dtype, update.device)
    spans, size = list(update.spans()), 1
    if update.device.type == "cpu":
        size = min(_BLOCKS_EACH * crew().size, max(_FEW_BLOCKS, len(spans) // 4))
    for start in range(0, len(spans), size):
        gram.add(crew().map(scaled, spans[start : start + size]))
    return gram


def _by_factor(update: MatrixUpdate, rough: Tensor, energy: float | None) -> Spectrum | None:
    """Return the spectrum of an update of low numerical rank from a tall factor, or None.

    With Q `[small, q]` spanning the singular directions above the noise, dW = (dW Q) Q^T + R. The
    singular values of dW Q are found in float64; ||R||_F, computed and not estimated, bounds all the
    others and the error made by leaving them out.

    Args:
        update: the matrix.
        rough: `[small, q]`, float64, about the span of Q.
        energy: R of the split, None for the effective rank.
    """

    # One step of subspace iteration: float32 vectors leave up to 1e-5 of dW outside their span.
    def powered(span: tuple[int, int]) -> Tensor:
        delta = update.block(*span, dtype=torch.float64).delta
        return delta.T @ (delta @ rough)

    leading, _ = torch.linalg.qr(crew().sum(powered, update.spans()))

    def projected(span: tuple[int, int]) -> Tensor:
        """Return the Gram matrix of the factor, and behind it ||R||_F^2."""
        delta = update.block(*span, dtype=torch.float64).delta
        factor = delta @ leading
        rest = (delta - factor @ leading.T).square().sum()
        return torch.cat([(factor.T @ factor).flatten(), rest[None]])

    q = leading.shape[1]
    sums = crew().sum(projected, update.spans())
    rest = float(sums[-1])
    eigen = DenseEigen(sums[:-1].view(q, q))
    found = eigen.values.flip(0).clamp(min=0).sqrt()
    others = update.small - rough.shape[1]
    padded = torch.cat([found, found.new_zeros(others)])
    left_out = torch.cat(
        [
            (rest / found).clamp(max=math.sqrt(rest)),
            torch.full((others,), math.sqrt(rest / others), dtype=torch.float64),
        ]
    )
    if not is_certain(padded, Doubt(left_out, torch.zeros_like(padded)), energy):
        return None
    everywhere = torch.ones(update.small, dtype=torch.bool)
    return Spectrum(found, "factor", True, Rotated(leading, eigen), everywhere)


def _by_svd(update: MatrixUpdate) -> Spectrum | None:
    peak = _finite_peak(update)
    if peak == 0:
        return None
    scale = _scale_for(peak, torch.float64)
    dense = update.block(0, update.long, dtype=torch.float64).delta * scale
    with torch_threads(max(torch.get_num_threads(), crew().size)):
        _, values, right = torch.linalg.svd(dense, full_matrices=False)
    everywhere = torch.ones(update.small, dtype=torch.bool)
    values = values.cpu() / scale
    return Spectrum(values, "svd", True, Known(right.T.flip(1)), everywhere)


def _finite_peak(update: MatrixUpdate) -> float:
    peak = update.peak()
    if not math.isfinite(peak):
        raise NonFiniteError("the update holds NaN or infinity")
    return peak


def _scale_for(peak: float, dtype: torch.dtype) -> float:
    """Return the power of two that brings `peak` to about 1: scaling by it changes no digit.

    For a subnormal peak it stays within the range of `dtype`.
    """
    return 2.0 ** min(-math.frexp(peak)[1], 126 if dtype == torch.float32 else 1022)
