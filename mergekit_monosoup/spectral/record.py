"""What was found and done in a matrix, and in a tensor that holds one or many."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from mergekit_monosoup.spectral.matrix import ViewKind
from mergekit_monosoup.spectral.mixing import Coefficients, Mixing, mixing_coefficients
from mergekit_monosoup.spectral.split import Split, effective_rank


@dataclass(frozen=True)
class MatrixRecord:
    """What was found and done in one matrix: its rank r, the split, the coefficients and ||dW||_F.

    `noise` and `threshold` are there where the split is a noise threshold. `survived` and `intended` are
    <E', E> and <E, E> of an edit, of some entries: see `Storage.survival`. `values` are the singular values
    `[r]`, or those that are not zero by the update's making, up to a factor.
    """

    rank: int
    k: int
    effective_rank: float
    coefficients: Coefficients
    backend: str
    norm: float
    noise: float | None = None
    threshold: float | None = None
    survived: float = 0.0
    intended: float = 0.0
    values: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        values: Tensor,
        shape: tuple[int, int],
        split: Split,
        mixing: Mixing,
        backend: str,
        scaling: float = 1.0,
    ) -> MatrixRecord:
        """Return what a split and a mixing find in the singular values of a matrix, over `scaling`."""
        k = split.index(values, shape)
        c = mixing_coefficients(values, k, mixing)
        norm = scaling * float(values.norm())
        threshold = split.threshold(*shape)
        noise = tau = None
        if threshold is not None:
            noise, tau = scaling * threshold.noise(values), scaling * threshold.threshold(values)
        return cls(min(shape), k, effective_rank(values), c, backend, norm, noise, tau, values=values)


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
    def noise(self) -> float:
        """Noise level sigma of a noise threshold."""
        return self._mean([m.noise for m in self.matrices if m.noise is not None])

    @property
    def threshold(self) -> float:
        """Noise threshold tau."""
        return self._mean([m.threshold for m in self.matrices if m.threshold is not None])

    @property
    def survival(self) -> float:
        """<E', E> / <E, E>: the part of the edit E that its rounded copy E' holds; NaN where E is zero."""
        intended = math.fsum(m.intended for m in self.matrices)
        return math.fsum(m.survived for m in self.matrices) / intended if intended else math.nan

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
