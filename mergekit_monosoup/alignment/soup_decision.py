"""Which checkpoints make up a soup: the decision of `sfgs`, and how it is put into words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_monosoup.alignment.selection import select_soup
from mergekit_monosoup.alignment.stored import Alignment


@dataclass(frozen=True)
class Candidate:
    """One checkpoint, and its average cosine to the soup it met; None for the first."""

    model: str
    taken: bool
    average: float | None


@dataclass(frozen=True)
class SoupDecision:
    """Which checkpoints make up the soup; `candidates` in the order they were considered."""

    taken: frozenset[Any]
    candidates: tuple[Candidate, ...]
    threshold: float
    tensors: int

    def sentence(self) -> str:
        """Return the decision in one sentence of Markdown."""
        parts = [
            f"{c.model} ({'the first' if c.average is None else f'average cosine {c.average:.4f}'}, "
            f"{'taken' if c.taken else 'left out'})"
            for c in self.candidates
        ]
        return (
            f"Similarity-Filtered Greedy Soup took {len(self.taken)} of {len(parts)} checkpoints at "
            f"threshold {self.threshold:g}, by the cosines of {self.tensors} tensors: "
            f"{'; '.join(parts)}."
        )


def soup_decision(
    models: Sequence[Any], alignment: Alignment, threshold: float, order: Sequence[int]
) -> SoupDecision:
    """Return which of the models make up the soup.

    Args:
        models: their ids, in the order of `alignment`.
        alignment: inner products of their updates.
        threshold: a candidate's average cosine to the soup must exceed it.
        order: in which the models are considered, as indices.
    """
    selection = select_soup(alignment.products, threshold, order)
    candidates = tuple(
        Candidate(_label(models[index]), index in selection.taken, selection.averages.get(index))
        for index in order
    )
    taken = frozenset(models[index] for index in selection.taken)
    return SoupDecision(taken, candidates, threshold, len(alignment.names))


def _label(model: Any) -> str:
    return f"input {model}" if isinstance(model, int) else str(model)


def in_words(held: Sequence[Any], taken: Collection[Any]) -> str:
    """Return what a tensor of the soup is made of.

    Args:
        held: the checkpoints of the soup that have the tensor.
        taken: all checkpoints of the soup.
    """
    if not held:
        return "no checkpoint of the soup has it: the base's value"
    names = ", ".join(_label(model) for model in held)
    if len(held) < len(taken):
        return f"of {len(taken)} checkpoints in the soup, {names} has it"
    return f"the soup is {names}"
