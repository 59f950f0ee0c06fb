"""The Gram matrix of an update, formed in blocks and decomposed, with what rounding leaves in doubt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.spectral.certify import (
    Doubt,
    expected_subspace_error,
    gram_doubt,
    product_error,
    reduction_error,
    subspace_tolerance,
)
from mergekit_monosoup.spectral.crew import crew
from mergekit_monosoup.spectral.eigen import SymmetricEigen, by_tridiagonal_form, decomposed
from mergekit_monosoup.spectral.products import GramSum
from mergekit_monosoup.spectral.update import MatrixUpdate

# Sums of squares outside this range are formed again from scaled entries.
_SAFE = {torch.float32: (1e-28, 1e34), torch.float64: (1e-280, 1e280)}
# Participation ratio from which a spectrum is flat enough for float32 to reduce the Gram matrix to
# tridiagonal form. Where it is not, the result must be rounded so coarsely that the error is hidden.
FLAT = 0.1
# Ratio of the sides from which the smallest singular values are well above zero, unless the spectrum is
# steep. In a square matrix some drown in a float32 reduction, and k is in doubt every other time.
_OBLONG = 1.25
# Ratio from which products take so much longer that a float64 reduction does not count.
_LONG = 8
# Blocks that each thread converts before all of them multiply: waiting for each other costs time. More than a
# few are no more than a quarter of the matrix.
_BLOCKS_EACH, _FEW_BLOCKS = 2, 4


@dataclass(frozen=True)
class GramDecomposition:
    """Eigenpairs of a Gram matrix of entries times `scale`, a power of two.

    `values` are the singular values of the columns that the update touches (`live`), `[q]`, descending,
    float64 on the CPU, `doubt` their errors and `diagonal` the squared norms of the columns; all three belong
    to scaled entries. `error` and `reduction` are those of `certify`, `hidden` what rounding hides.
    """

    values: Tensor
    doubt: Doubt
    eigen: SymmetricEigen
    live: Tensor
    scale: float
    diagonal: Tensor
    error: float
    reduction: float
    hidden: float


def gram_decomposition(update: MatrixUpdate, dtype: torch.dtype) -> GramDecomposition | None:
    """Decompose the smaller Gram matrix of an update, products being in `dtype`; None if it is zero.

    Raises:
        NonFiniteError: NaN or infinity in the update.
    """
    scale = 1.0
    gram = _accumulated(update, dtype, scale)
    low, high = _SAFE[dtype]
    # NaN fails the comparison as well: inputs are looked at again only when something is wrong.
    if not low < float(gram.diagonal().max()) < high:
        peak = finite_peak(update)
        if peak == 0:
            return None
        scale = scale_for(peak, dtype)
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
    doubt = gram_doubt(values, diagonal, error, reduction)
    return GramDecomposition(values, doubt, eigen, live, scale, diagonal, error, reduction, hidden)


def _float32_reduces(update: MatrixUpdate, participation: float, hidden: float) -> bool:
    """Say whether float32 may be expected to do for the reduction of the Gram matrix to tridiagonal form."""
    if participation > FLAT:
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


def finite_peak(update: MatrixUpdate) -> float:
    """Return max |dW|.

    Raises:
        NonFiniteError: NaN or infinity in the update.
    """
    peak = update.peak()
    if not math.isfinite(peak):
        raise NonFiniteError("the update holds NaN or infinity")
    return peak


def scale_for(peak: float, dtype: torch.dtype) -> float:
    """Return the power of two that brings `peak` to about 1: scaling by it changes no digit.

    For a subnormal peak it stays within the range of `dtype`.
    """
    return 2.0 ** min(-math.frexp(peak)[1], 126 if dtype == torch.float32 else 1022)
