"""What a plan says of embeddings whose rows not all checkpoints have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_monosoup.checkpoint.headers import Checkpoint, StoredTensor
from mergekit_monosoup.checkpoint.vocabulary import SharedRows, Vocabularies
from mergekit_monosoup.planning.planned import Source
from mergekit_monosoup.planning.problems import Problems

Found = Sequence[tuple[Source, StoredTensor]]


class PlannedRows:
    """Match the rows of embeddings as the merge does."""

    def __init__(
        self, data: Mapping[str, Any], models: Sequence[Checkpoint], problems: Problems, *, truncate: bool
    ) -> None:
        """Take the recipe and its checkpoints; `truncate` is mergekit's option for embeddings."""
        self.by_row = not (truncate or data.get("tokenizer") or data.get("tokenizer_source"))
        """Whether rows are matched without the recipe's help."""
        self._vocabularies = Vocabularies(models)
        self._problems = problems
        self._said = False

    def shared(self, axis: int | None, found: Found) -> SharedRows | None:
        """Return the rows in common of an embedding, None where that is all of them.

        Raises:
            InputError: the tokenizers have too few tokens in common.
        """
        if axis is None or not self.by_row or not all(len(tensor.shape) > axis for _, tensor in found):
            return None
        rows = self._vocabularies.shared({s.checkpoint.name: t.shape[axis] for s, t in found})
        unread = self._vocabularies.unread
        if rows is not None and unread and not self._said:
            self._said = True
            self._problems.warning(
                f"vocabularies differ in size and {unread[0]} has no tokenizer that could be read; rows of "
                "embeddings are matched by index"
            )
        return rows


def merged_shape(shape: tuple[int, ...], axis: int | None, rows: SharedRows | None) -> tuple[int, ...]:
    """Return the shape of what the merge method sees of a tensor."""
    if rows is None or axis is None:
        return shape
    return (*shape[:axis], len(rows.into), *shape[axis + 1 :])
