"""Singular values of an update and a basis of the subspace on one side of the split.

Neither V nor a full SVD is needed: the smaller Gram matrix has the singular values as roots of its
eigenvalues, and its eigenvectors span the leading subspace and its complement. Products in float32 are
enough for most updates; `certify` decides afterwards, and float64 or an SVD takes over where they are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mergekit_monosoup.spectral.certify import Doubt, is_certain, subspace_error, subspace_tolerance
from mergekit_monosoup.spectral.crew import crew, torch_threads
from mergekit_monosoup.spectral.eigen import VectorSource
from mergekit_monosoup.spectral.gram import FLAT, finite_peak, gram_decomposition, scale_for
from mergekit_monosoup.spectral.low_rank import by_factor
from mergekit_monosoup.spectral.precision import float64_pays, full_float32
from mergekit_monosoup.spectral.sample import numerical_rank, sample
from mergekit_monosoup.spectral.sources import Known, Refined, among_all
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split
from mergekit_monosoup.spectral.update import MatrixUpdate

Backend = Literal["auto", "gram", "svd"]

# Numerical rank, as a share of the smaller side, up to which an update is treated through a factor.
_LOW_RANK = 1 / 8


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one matrix, seen from its smaller side.

    `singular_values` is `[q]`, descending, float64 on the CPU; q is the number of columns of the
    smaller side that the update touches, all further singular values are zero. `backend` says how
    they were obtained: `gram32`, `gram64` (precision of the products), `factor` (low numerical rank) or
    `svd`; `certain` whether split, coefficients and subspace are beyond doubt; `shape` is that of the matrix.
    """

    singular_values: Tensor
    backend: str
    certain: bool
    shape: tuple[int, int]
    _eigen: VectorSource
    _live: Tensor
    _doubt: Doubt | None = None

    def decides(self, split: Split) -> bool:
        """Say whether another split than the one it was made for, and its coefficients, are beyond doubt."""
        return self._doubt is None or is_certain(self.singular_values, self._doubt, split, self.shape)

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

    def directions(self, start: int, stop: int) -> Tensor:
        """Return singular directions `start` to `stop` of the smaller side, by descending values.

        They are as certain as the products behind them: those of a spectrum in float64 are good at any cut,
        those of float32 at its own split alone.

        Returns:
            `[small, stop - start]`.
        """
        q = len(self.singular_values)
        return among_all(self._eigen.vectors(q - stop, q - start).flip(1), self._live)


def decompose(
    update: MatrixUpdate, split: Split = EFFECTIVE_RANK, backend: Backend = "auto"
) -> Spectrum | None:
    """Return the spectrum of an update, precise enough for a split; None if the update is zero.

    Args:
        update: the matrix.
        split: the rule that is going to be applied.
        backend: `gram` goes as far as float64; `auto` goes on to the SVD where that is in doubt and
            starts with it for float64 inputs; `svd` is the yardstick, in float64.

    Raises:
        NonFiniteError: NaN or infinity in the update.
    """
    if backend == "svd" or (backend == "auto" and update.dtype == torch.float64):
        return _by_svd(update, split)
    with full_float32(update.device):
        found, in_float32 = _from_a_sample(update, split)
        if found is not None:
            return found
        if in_float32 and not float64_pays(update.device):
            first = _by_gram(update, torch.float32, split)
            if first is None or first.certain:
                return first
            q = numerical_rank(first.singular_values)
            if 0 < q <= _LOW_RANK * update.small:
                factored = _by_factor(update, first.basis(q)[0].double(), split)
                if factored is not None:
                    return factored
            del first
        second = _by_gram(update, torch.float64, split)
    if second is None or second.certain or backend == "gram":
        return second
    return _by_svd(update, split)


def _from_a_sample(update: MatrixUpdate, split: Split) -> tuple[Spectrum | None, bool]:
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
        return _by_factor(update, looked.directions(q), split), True
    # The small values of a steep spectrum would be in doubt, and the work done twice.
    return None, looked.participation > FLAT


def _by_gram(update: MatrixUpdate, dtype: torch.dtype, split: Split) -> Spectrum | None:
    found = gram_decomposition(update, dtype)
    if found is None:
        return None
    values, diagonal, error, reduction = found.values, found.diagonal, found.error, found.reduction
    certain = is_certain(values, found.doubt, split, update.shape)
    source: VectorSource = found.eigen
    if certain:
        k, tolerance = split.index(values, update.shape), subspace_tolerance(found.hidden)
        if subspace_error(values, diagonal, error, k, reduction) > tolerance:
            refined = Refined(found.eigen, update, found.live, found.scale, len(values) - k, len(values))
            certain = subspace_error(values, diagonal, error, k, reduction, refined.width) <= tolerance
            source = refined if certain else source
    doubt = replace(
        found.doubt, shift=found.doubt.shift / found.scale, spread=found.doubt.spread / found.scale
    )
    name = "gram32" if dtype == torch.float32 else "gram64"
    return Spectrum(values / found.scale, name, certain, update.shape, source, found.live, doubt)


def _by_factor(update: MatrixUpdate, rough: Tensor, split: Split) -> Spectrum | None:
    found = by_factor(update, rough, split)
    if found is None:
        return None
    values, source = found
    everywhere = torch.ones(update.small, dtype=torch.bool, device="cpu")
    return Spectrum(values, "factor", True, update.shape, source, everywhere)


def _by_svd(update: MatrixUpdate, split: Split) -> Spectrum | None:
    peak = finite_peak(update)
    if peak == 0:
        return None
    scale = scale_for(peak, torch.float64)
    dense = update.block(0, update.long, dtype=torch.float64).delta * scale
    with torch_threads(max(torch.get_num_threads(), crew().size)):
        _, values, right = torch.linalg.svd(dense, full_matrices=False)
    everywhere = torch.ones(update.small, dtype=torch.bool, device="cpu")
    values = values.cpu() / scale
    threshold = split.threshold(*update.shape)
    if threshold is not None:
        values = threshold.without_rounding(values)
    return Spectrum(values, "svd", True, update.shape, Known(right.T.flip(1)), everywhere)
