"""Where the singular directions of an update come from: found already, within a span, or refined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_monosoup.spectral.crew import crew
from mergekit_monosoup.spectral.eigen import VectorSource
from mergekit_monosoup.spectral.update import MatrixUpdate


def among_all(vectors: Tensor, live: Tensor) -> Tensor:
    """Return vectors of the columns that the update touches as vectors of all columns."""
    if len(vectors) == len(live):
        return vectors
    whole = vectors.new_zeros(len(live), vectors.shape[1])
    whole[live.to(vectors.device)] = vectors
    return whole


@dataclass(frozen=True)
class Known:
    """Vectors in ascending order that are there already."""

    ascending: Tensor

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return vectors `start` to `stop`."""
        return self.ascending[:, start:stop]


@dataclass(frozen=True)
class Rotated:
    """Eigenvectors within the span of `span` `[small, q]`."""

    span: Tensor
    inner: VectorSource

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return vectors `start` to `stop` in ascending order, `[small, stop - start]`."""
        return self.span @ self.inner.vectors(start, stop)


@dataclass(frozen=True)
class Refined:
    """Eigenvectors on one side of a split; those next to it are Ritz vectors of the update itself.

    Directions whose singular values are close turn into each other by the smallest of errors. Within the span
    of a few on both sides of the split, whose outer neighbours are far, the Rayleigh-Ritz method tells them
    apart by the update in float64.

    `live` marks the columns that the update touches and the vectors belong to; entries are scaled by `scale`;
    `split` and `size` are the numbers of directions below the split and in all.
    """

    eigen: VectorSource
    update: MatrixUpdate
    live: Tensor
    scale: float
    split: int
    size: int
    width: int = 16

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return vectors `start` to `stop` in ascending order, all of them on one side of the split."""
        low, high = max(0, self.split - self.width), min(self.size, self.split + self.width)
        below = start < self.split
        first, last = (0, high) if below else (low, self.size)
        found = self.eigen.vectors(first, last)
        near = slice(low - first, high - first)
        found[:, near] = self._ritz_vectors(found[:, near])
        return found[:, start - first : stop - first]

    def _ritz_vectors(self, vectors: Tensor) -> Tensor:
        # Orthogonal to float32 alone, they would be mixed as before.
        basis, _ = torch.linalg.qr(vectors.double())
        within = among_all(basis, self.live)

        def square(span: tuple[int, int]) -> Tensor:
            seen = self.update.block(*span, dtype=torch.float64).delta * self.scale @ within
            return seen.T @ seen

        _, turn = torch.linalg.eigh(crew().sum(square, self.update.spans()))
        found: Tensor = (basis @ turn).to(vectors.dtype)
        return found


@dataclass(frozen=True)
class Stacked:
    """The vectors of `above` behind the last `count` of those of `below`.

    `below` knows the columns marked in `live` alone.
    """

    count: int
    below: VectorSource
    live: Tensor
    above: VectorSource

    def vectors(self, start: int, stop: int) -> Tensor:
        """Return vectors `start` to `stop` in ascending order, `[small, stop - start]`."""
        skipped = int(self.live.sum()) - self.count
        parts = []
        if start < self.count:
            below = self.below.vectors(start + skipped, min(stop, self.count) + skipped)
            parts.append(among_all(below, self.live).double())
        if stop > self.count:
            parts.append(self.above.vectors(max(start - self.count, 0), stop - self.count).double())
        return torch.cat(parts, dim=1)
