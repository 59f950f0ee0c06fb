"""Similarity-Filtered Greedy Soup: which checkpoints belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layers = Literal["matrices", "all"]

# arXiv 2602.09689 names no threshold. The largest one that, in benchmarks/robustness/RESULTS.md, refuses no
# checkpoint that a greedy soup with held-out data keeps.
DEFAULT_THRESHOLD = 0.4

# Share of the members' squared norms below which a soup's update has cancelled: what is left is
# the rounding of float32 inner products.
_CANCELLED = 1e-6


@dataclass(frozen=True)
class Selection:
    """The outcome of one greedy pass over N checkpoints, by index.

    `order` lists all candidates as they were considered, `taken` those in the soup, and `averages`
    the average cosine to the soup of its time, for every candidate but the first.
    """

    order: tuple[int, ...]
    taken: tuple[int, ...]
    averages: dict[int, float]


def considered_in_order(count: int, scores: Sequence[float] | None) -> tuple[int, ...]:
    """Return 0..count-1 by descending score, ties and absent scores as they come."""
    if scores is None:
        return tuple(range(count))
    return tuple(sorted(range(count), key=lambda index: -scores[index]))


def select_soup(products: Tensor, threshold: float, order: Sequence[int]) -> Selection:
    """Take each candidate whose average cosine to the running soup exceeds `threshold`.

    The soup's update is the mean of those already in it; the first of `order` always is (arXiv
    2602.09689, Similarity-Filtered Greedy Soup). All of it follows from inner products:
    cos(dW_c, dW_soup) = sum_i G_ci / sqrt(G_cc sum_ij G_ij), i and j over the soup.

    Args:
        products: <dW_i, dW_j>, float64 `[tensors, N, N]`, each tensor up to a factor of its own.
        threshold: the average must exceed it.
        order: the candidates in the order they are considered.
    """
    taken = [order[0]]
    averages = {}
    for candidate in order[1:]:
        cosines = soup_cosines(products, candidate, taken)
        averages[candidate] = float(cosines.mean()) if len(cosines) else 0.0
        if averages[candidate] > threshold:
            taken.append(candidate)
    return Selection(tuple(order), tuple(taken), averages)


def soup_cosines(products: Tensor, candidate: int, soup: Sequence[int]) -> Tensor:
    """Return cos(dW_candidate, dW_soup) for the tensors where neither update is zero."""
    members = list(soup)
    own = products[:, candidate, candidate]
    cross = products[:, candidate, members].sum(-1)
    within = products[:, members][:, :, members]
    squared = within.sum((-2, -1))
    counts = (own > 0) & (squared > _CANCELLED * within.diagonal(dim1=-2, dim2=-1).sum(-1))
    # Roots before the product: the squared norms may be tiny.
    return (cross[counts] / (own[counts].sqrt() * squared[counts].sqrt())).clamp(-1, 1)
