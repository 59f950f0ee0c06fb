"""Does a checkpoint descend from the one that is called its base? Answered from sampled values."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_monosoup.checkpoint.headers import Checkpoint, load_pickle

# Fine-tuning, even long continued pre-training, leaves cos(W0, W1) well above this; the weights of two
# separate trainings have a cosine near 0.
_RELATED = 0.5
# A checkpoint is judged by this many of its matrices, and not by fewer than the least.
SAMPLED_TENSORS, _FEWEST_TENSORS = 9, 3
_ENTRIES = 1 << 14
_CONNECTIONS = 8
_PLAIN = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}


@dataclass(frozen=True)
class Relation:
    """How one fine-tuned tensor lies to its base.

    `relative_update` is ||dW|| / ||W0||, `update_cosine` cos(dW, W0), `weight_cosine` cos(W0, W1).
    """

    tensor: str
    relative_update: float
    update_cosine: float
    weight_cosine: float


def relation(tensor: str, w0: NDArray[np.float64], w1: NDArray[np.float64]) -> Relation | None:
    """Return the relation of (sampled) entries; None where one of the tensors is zero or not finite.

    Args:
        tensor: its name.
        w0, w1: the same entries of base and fine-tuned tensor, flat.
    """
    dw = w1 - w0
    base, finetuned, update = (float(np.linalg.norm(x)) for x in (w0, w1, dw))
    if not (base > 0 and finetuned > 0 and math.isfinite(base + finetuned + update)):
        return None
    inner = float(dw @ w0)
    cosine = inner / (update * base) if update else 0.0
    return Relation(tensor, update / base, cosine, (base * base + inner) / (base * finetuned))


def unrelated(base: str, finetuned: str, relations: Sequence[Relation]) -> str | None:
    """Return the message for a base that cannot be one, None where nothing speaks against it.

    Unrelated weights give ||dW|| / ||W0|| near sqrt(2) and cos(dW, W0) near -1/sqrt(2): the update
    takes the base away and puts something else in its place.
    """
    if not relations or median(r.weight_cosine for r in relations) >= _RELATED:
        return None
    size = median(r.relative_update for r in relations)
    cosine = median(r.update_cosine for r in relations)
    return (
        f"base_model {base} may not be the base of {finetuned}: in {len(relations)} sampled tensors the "
        f"update is {size:.2f} times as large as the base and its cosine to the base is {cosine:.2f} "
        "(medians), as between unrelated weights; name the checkpoint that the fine-tuning started from"
    )


class BaseWatch:
    """Judge the base by the first matrices of each fine-tuned checkpoint that come by."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, list[Relation]] = {}
        self._warned: set[str] = set()

    def has_seen_enough(self, finetuned: str) -> bool:
        """Say whether further tensors of a checkpoint need not be looked at."""
        with self._lock:
            return finetuned in self._warned or len(self._seen.get(finetuned, ())) >= SAMPLED_TENSORS

    def see(
        self, base: str, finetuned: str, tensor: str, w0: NDArray[np.float64], w1: NDArray[np.float64]
    ) -> str | None:
        """Look at one tensor; return the message for a base that is none, once for each checkpoint."""
        return self.take(base, finetuned, relation(tensor, w0, w1))

    def take(self, base: str, finetuned: str, found: Relation | None) -> str | None:
        """Take what one tensor says, as `see` does."""
        with self._lock:
            seen = self._seen.setdefault(finetuned, [])
            if found is not None:
                seen.append(found)
            if finetuned in self._warned or len(seen) < _FEWEST_TENSORS:
                return None
            message = unrelated(base, finetuned, seen)
            if message is not None:
                self._warned.add(finetuned)
            return message


def check_base(base: Checkpoint, finetuned: Checkpoint) -> str | None:
    """Return the message for a base that cannot be one, None where nothing speaks against it."""
    return unrelated(base.name, finetuned.name, sampled_relations(base, finetuned))


def sampled_relations(base: Checkpoint, finetuned: Checkpoint) -> list[Relation]:
    """Return how a few matrices of two checkpoints lie to each other.

    Reads 16 384 entries from the middle of each of nine matrices, spread over the model; of the Hub's files
    too, where the weights are there.

    Raises:
        InputError: a file is damaged, or the Hub cannot be reached.
    """
    common = [
        name
        for name, tensor in base.tensors.items()
        if (other := finetuned.tensors.get(name)) is not None
        and len(tensor.shape) >= 2
        and tensor.shape == other.shape
        and tensor.size
    ]
    step = max(1, len(common) // SAMPLED_TENSORS)
    first, second = _Samples(base), _Samples(finetuned)
    names = common[step // 2 :: step][:SAMPLED_TENSORS]
    if first.is_remote or second.is_remote:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            samples = list(pool.map(lambda name: (first(name), second(name)), names))
    else:
        samples = [(first(name), second(name)) for name in names]
    relations: list[Relation] = []
    for name, (w0, w1) in zip(names, samples, strict=True):
        found = relation(name, w0, w1) if w0 is not None and w1 is not None and w0.shape == w1.shape else None
        if found is not None:
            relations.append(found)
    return relations


def copied(relations: Sequence[Relation]) -> bool:
    """Say whether every sampled update is zero."""
    return bool(relations) and all(r.relative_update == 0 for r in relations)


def can_check(models: Sequence[Checkpoint]) -> bool:
    """Say whether the values of all these checkpoints are at hand."""
    return all(m.folder is not None or m.remote is not None for m in models)


class _Samples:
    """Entries from the middle of tensors of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._pickled: dict[str, Any] = {}

    @property
    def is_remote(self) -> bool:
        """Whether the weights are on the Hub."""
        return self._checkpoint.folder is None

    def __call__(self, name: str) -> NDArray[np.float64] | None:
        """Return the sample in float64, None where the dtype is none that updates are formed in."""
        tensor, folder = self._checkpoint.tensors[name], self._checkpoint.folder
        if tensor.dtype != "bfloat16" and tensor.dtype not in _PLAIN:
            return None
        count = min(tensor.size, _ENTRIES)
        start = (tensor.size - count) // 2
        if tensor.begin is None:
            if folder is None:
                return None
            return self._of_pickle(folder / tensor.file, tensor.stored or tensor.name, start, count)
        bytes_each = 2 if tensor.dtype == "bfloat16" else np.dtype(_PLAIN[tensor.dtype]).itemsize
        raw = self._bytes(tensor.file, tensor.begin + start * bytes_each, count * bytes_each)
        if raw is None:
            return None
        if tensor.dtype == "bfloat16":
            # bfloat16 is the upper half of float32; numpy has no type of its own for it.
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.frombuffer(raw, _PLAIN[tensor.dtype]).astype(np.float64)

    def _bytes(self, file: str, begin: int, length: int) -> bytes | None:
        folder, remote = self._checkpoint.folder, self._checkpoint.remote
        if folder is None:
            return remote.read(file, begin, length) if remote is not None else None
        with (folder / file).open("rb") as stream:
            stream.seek(begin)
            return stream.read(length)

    def _of_pickle(self, file: Path, name: str, start: int, count: int) -> NDArray[np.float64]:
        if file.name not in self._pickled:
            self._pickled[file.name] = load_pickle(file)
        values = self._pickled[file.name][name].flatten()[start : start + count]
        sample: NDArray[np.float64] = values.double().numpy()
        return sample
