"""The whole edit of one update: decompose, split, mix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError, ShapeMismatchError
from mergekit_monosoup.spectral.matrix import is_matrix_like, matrix_view
from mergekit_monosoup.spectral.mixing import Coefficients, Mixing, mixing_coefficients
from mergekit_monosoup.spectral.spectrum import decompose
from mergekit_monosoup.spectral.split import effective_rank, split_index


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


def edit_update(
    dw: Tensor, *, energy: float | None = None, mixing: Mixing = "monosoup"
) -> tuple[Tensor, EditRecord]:
    """Edit one update: lambda_high dW_high + lambda_low dW_low.

    The split and the coefficients are MonoSoup's (arXiv 2602.09689, section 4): k from the effective
    rank, or from the energy threshold where `energy` is given; lambda_low = rho + (1 - rho) cos alpha.

    Args:
        dw: update of a linear weight `[out, in]`, a convolution `[out, in, k, ...]` or a stack of
            experts `[experts, out, in]`; computed in float32, in float64 for float64.
        energy: R in (0, 1], or None for the effective rank.
        mixing: `monosoup` or one of the ablations.

    Returns:
        The edited update in the shape of `dw` and the dtype of the computation, and its record.

    Raises:
        ShapeMismatchError: fewer than two axes.
        NonFiniteError: NaN or infinity in `dw`.
    """
    if dw.ndim < 2:
        raise ShapeMismatchError(
            f"an update of shape {tuple(dw.shape)} is not a matrix; leave tensors with fewer than "
            "two axes unedited"
        )
    dw = dw if dw.dtype == torch.float64 else dw.float()
    if not is_matrix_like(tuple(dw.shape)):
        return dw, EditRecord(())
    stack = matrix_view(dw)
    edited = torch.empty_like(stack, memory_format=torch.contiguous_format)
    records = []
    for matrix, out in zip(stack, edited, strict=True):
        record = _edit_matrix(matrix, out, energy, mixing)
        if record is not None:
            records.append(record)
    return edited.reshape(dw.shape), EditRecord(tuple(records))


def _edit_matrix(matrix: Tensor, out: Tensor, energy: float | None, mixing: Mixing) -> MatrixRecord | None:
    """Write the edited `matrix` into `out`; None where there is no update."""
    peak = float(matrix.abs().max())
    if not math.isfinite(peak):
        raise NonFiniteError("the update holds NaN or infinity")
    if peak == 0:
        out.zero_()
        return None
    # A power of two leaves every digit as it is and keeps squares inside the range of the dtype.
    scale = 2.0 ** -math.frexp(peak)[1]
    spectrum = decompose(matrix * scale)
    values = spectrum.singular_values
    k = split_index(values, energy)
    c = mixing_coefficients(values, k, mixing)
    torch.mul(matrix, c.lambda_low, out=out)
    if c.lambda_high != c.lambda_low:
        high = spectrum.high_part(k) if k < len(values) else matrix * scale
        out.add_(high, alpha=(c.lambda_high - c.lambda_low) / scale)
    return MatrixRecord(len(values), k, effective_rank(values), c, spectrum.backend)
