"""Which rows of embeddings belong to the same token in several checkpoints."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.errors import InputError

# What a tokenizer's vocabulary can be stored in.
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "added_tokens.json",
)
# Of the smaller vocabulary; two tokenizers of one family share nearly all of it.
_IN_COMMON = 0.5

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SharedRows:
    """The rows that all checkpoints have.

    `into` are their positions in the layout of the first checkpoint, `rows` those in each checkpoint;
    `size` is the number of rows of that layout.
    """

    into: Rows
    rows: tuple[Rows, ...]
    size: int

    @property
    def kept(self) -> int:
        """Number of rows that some checkpoint does not have."""
        return self.size - len(self.into)


class Vocabularies:
    """The tokenizers of the checkpoints of one merge; the first one's layout is the output's."""

    def __init__(self, models: Sequence[Checkpoint]) -> None:
        """Take the checkpoints, the first fine-tuned one before all others."""
        self._models = tuple(models)
        self._found: dict[tuple[tuple[str, int], ...], SharedRows | None] = {}

    def shared(self, sizes: Mapping[str, int]) -> SharedRows | None:
        """Return the rows in common, None where all checkpoints have the same rows in the same places.

        Args:
            sizes: rows by checkpoint, for those that have the tensor.

        Raises:
            InputError: the tokenizers have too few tokens in common.
        """
        key = tuple(sizes.items())
        if key not in self._found:
            self._found[key] = self._match([m for m in self._models if m.name in sizes], sizes)
        return self._found[key]

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return names of checkpoints in the order of `SharedRows.rows`."""
        wanted = set(names)
        return [model.name for model in self._models if model.name in wanted]

    @cached_property
    def unread(self) -> list[str]:
        """The checkpoints without a tokenizer that can be read."""
        return [m.name for m in self._models if m.beside is not None and self._tokens(m) is None]

    def _match(self, models: Sequence[Checkpoint], sizes: Mapping[str, int]) -> SharedRows | None:
        if len(models) < 2:
            return None
        first = models[0]
        count = sizes[first.name]
        places = [np.arange(count)] + [self._places(first, count, m, sizes[m.name]) for m in models[1:]]
        shared = np.all([rows >= 0 for rows in places], axis=0)
        into = np.flatnonzero(shared)
        if len(into) == count and all(
            sizes[m.name] == count and np.array_equal(rows, into)
            for m, rows in zip(models, places, strict=True)
        ):
            return None
        return SharedRows(into, tuple(rows[into] for rows in places), count)

    def _places(self, first: Checkpoint, count: int, other: Checkpoint, other_count: int) -> Rows:
        """Return for each row of `first` the row of `other`, -1 where it has none."""
        by_index = np.arange(count)
        by_index[other_count:] = -1
        if _same_files(first, other):
            return by_index
        ours, theirs = self._tokens(first), self._tokens(other)
        if ours is None or theirs is None or ours == theirs:
            return by_index
        common = len(ours.keys() & theirs.keys())
        if common < _IN_COMMON * min(len(ours), len(theirs)):
            raise InputError(
                f"the tokenizers of {first.name} and {other.name} have {common} tokens in common (of "
                f"{len(ours)} and {len(theirs)}), so their embeddings cannot be matched token by token; add "
                f"`tokenizer: {{source: {first.name}}}`, which keeps the tokens of {first.name}"
            )
        # Padding beyond both tokenizers is matched by index.
        taken = np.array(sorted(i for i in theirs.values() if i < count), dtype=np.int64)
        by_index[taken] = -1
        for token, row in ours.items():
            if row < count:
                place = theirs.get(token, -1)
                by_index[row] = place if place < other_count else -1
        return by_index

    def _tokens(self, model: Checkpoint) -> dict[str, int] | None:
        if model.name not in self._read:
            self._read[model.name] = _read_tokens(model.beside) if model.beside is not None else None
        return self._read[model.name]

    @cached_property
    def _read(self) -> dict[str, dict[str, int] | None]:
        return {}


def rows_kept(count: int) -> str:
    """Return what is said of rows that take no part in a merge."""
    return (
        f"{count} row{'s' if count != 1 else ''} the base does not have {'are' if count != 1 else 'is'} kept"
    )


def _has_tokenizer(model: Checkpoint) -> bool:
    return model.beside is not None and any((model.beside / name).is_file() for name in _FILES)


def _same_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Say whether two tokenizers are stored in the same bytes, or one of them is not stored at all."""
    if not (_has_tokenizer(one) and _has_tokenizer(other)):
        return True
    folders = [folder for folder in (one.beside, other.beside) if folder is not None]
    held = [{name for name in _FILES if (folder / name).is_file()} for folder in folders]
    # With this file alone the vocabulary is complete.
    names = {"tokenizer.json"} if all("tokenizer.json" in names for names in held) else held[0] | held[1]
    return all(name in held[0] and name in held[1] for name in names) and all(
        filecmp.cmp(folders[0] / name, folders[1] / name, shallow=False) for name in names
    )


def _read_tokens(folder: Path) -> dict[str, int] | None:
    """Return the tokens of a folder's tokenizer with their ids, None where it cannot be read."""
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        # The library raises plain Exception for a file that it cannot read.
        try:
            return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
        except Exception:  # noqa: BLE001
            return None
    if not any((folder / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError):
        return None
    return dict(loaded.get_vocab())
