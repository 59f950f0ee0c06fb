"""Whether the base is the base: from a few entries of a few local tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mergekit_monosoup.checkpoint.headers import Checkpoint, StoredTensor
from mergekit_monosoup.checkpoint.lineage import Relation, relation, unrelated

_TENSORS = 9
_ENTRIES = 1 << 14
_PLAIN = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}


def check_base(base: Checkpoint, finetuned: Checkpoint) -> str | None:
    """Return the message for a base that cannot be one, None where nothing speaks against it.

    Reads 16 384 entries from the middle of each of nine matrices, spread over the model, and only from
    local safetensors files.
    """
    common = [
        name
        for name, tensor in base.tensors.items()
        if (other := finetuned.tensors.get(name)) is not None
        and len(tensor.shape) >= 2
        and tensor.shape == other.shape
        and tensor.begin is not None
        and other.begin is not None
    ]
    step = max(1, len(common) // _TENSORS)
    relations: list[Relation] = []
    for name in common[step // 2 :: step][:_TENSORS]:
        found = _relation(name, _sample(base, name), _sample(finetuned, name))
        if found is not None:
            relations.append(found)
    return unrelated(base.name, finetuned.name, relations)


def can_check(models: Sequence[Checkpoint]) -> bool:
    """Say whether the values of all these checkpoints are at hand."""
    return all(m.folder is not None and any(t.begin is not None for t in m.tensors.values()) for m in models)


def _relation(name: str, w0: NDArray[np.float64] | None, w1: NDArray[np.float64] | None) -> Relation | None:
    if w0 is None or w1 is None or w0.shape != w1.shape:
        return None
    dw = w1 - w0
    n0, n1, n = (float(np.linalg.norm(x)) for x in (w0, w1, dw))
    return relation(name, n0, n1, n, float(dw @ w0))


def _sample(checkpoint: Checkpoint, name: str) -> NDArray[np.float64] | None:
    tensor = checkpoint.tensors[name]
    if checkpoint.folder is None or tensor.begin is None:
        return None
    bytes_each = 2 if tensor.dtype == "bfloat16" else np.dtype(_PLAIN.get(tensor.dtype, "u1")).itemsize
    if tensor.dtype != "bfloat16" and tensor.dtype not in _PLAIN:
        return None
    count, start = _window(tensor)
    with (checkpoint.folder / tensor.file).open("rb") as stream:
        stream.seek(tensor.begin + start * bytes_each)
        raw = stream.read(count * bytes_each)
    if tensor.dtype == "bfloat16":
        # bfloat16 is the upper half of float32; numpy has no type of its own for it.
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, _PLAIN[tensor.dtype]).astype(np.float64)


def _window(tensor: StoredTensor) -> tuple[int, int]:
    count = min(tensor.size, _ENTRIES)
    return count, (tensor.size - count) // 2
