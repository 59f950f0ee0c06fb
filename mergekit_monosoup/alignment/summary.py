"""What the inner products of several checkpoints say about merging them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any, get_args

from torch import Tensor

from mergekit_monosoup.alignment.selection import Selection, considered_in_order, select_soup
from mergekit_monosoup.alignment.stock import Angle, model_stock_ratio


@dataclass(frozen=True)
class Spread:
    """Smallest value, quartiles, largest value and mean of a sample; NaN where it is empty."""

    lowest: float
    lower_quartile: float
    median: float
    upper_quartile: float
    highest: float
    mean: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of a sample."""
        if not values:
            nan = math.nan
            return cls(nan, nan, nan, nan, nan, nan)
        lower, median, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(min(values), lower, median, upper, max(values), fmean(values))


@dataclass(frozen=True)
class AlignmentSummary:
    """The alignment of N fine-tuned checkpoints over the tensors that were compared.

    `pairs[i, j]`, i < j, are the cosines between two checkpoints' updates, tensor by tensor, without
    the tensors in which either is zero; `ratios` are Model Stock's t for each tensor.
    """

    count: int
    pairs: dict[tuple[int, int], list[float]]
    ratios: dict[str, list[float]]
    selection: Selection

    def average(self, i: int, j: int) -> float:
        """Return the average cosine of two checkpoints; NaN if no tensor has both updates."""
        if i == j:
            return 1.0
        values = self.pairs[min(i, j), max(i, j)]
        return fmean(values) if values else math.nan

    def averages(self) -> list[list[float]]:
        """Return the N x N average cosines."""
        return [[self.average(i, j) for j in range(self.count)] for i in range(self.count)]

    def spreads(self) -> dict[tuple[int, int], Spread]:
        """Return the spread of each pair's cosines over the tensors."""
        return {pair: Spread.of(values) for pair, values in self.pairs.items()}

    def ratio_spreads(self) -> dict[str, Spread]:
        """Return the spread of Model Stock's ratio over the tensors, for each way to average angles."""
        return {angle: Spread.of(values) for angle, values in self.ratios.items()}


def summarize(
    products: Tensor, cosines: Tensor, *, threshold: float, scores: Sequence[float] | None = None
) -> AlignmentSummary:
    """Return the pairs' cosines, the filtered soup's choice and Model Stock's ratios.

    Args:
        products: <dW_i, dW_j>, float64 `[tensors, N, N]`.
        cosines: their cosines.
        threshold: of the Similarity-Filtered Greedy Soup.
        scores: one a checkpoint, highest first; None for the order given.
    """
    count = cosines.shape[-1]
    moved = products.diagonal(dim1=-2, dim2=-1) > 0
    pairs = {
        (i, j): _listed(cosines[moved[:, i] & moved[:, j], i, j])
        for i in range(count)
        for j in range(i + 1, count)
    }
    ratios = {angle: _listed(model_stock_ratio(cosines, angle=angle)) for angle in get_args(Angle)}
    selection = select_soup(products, threshold, considered_in_order(count, scores))
    return AlignmentSummary(count, pairs, ratios, selection)


def _listed(values: Tensor) -> list[float]:
    listed: Any = values.tolist()
    return [float(value) for value in listed]
