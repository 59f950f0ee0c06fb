"""Where each tensor of the output lies: files, headers and byte ranges, before the first is computed."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_monosoup.checkpoint.safetensors_file import DTYPES

# torch's spelling -> (safetensors' spelling, bytes an entry)
STORED = {name: (spelt, bits // 8) for spelt, (name, bits) in DTYPES.items() if bits >= 8}
_METADATA = {"format": "pt"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Slot:
    """One tensor's place: bytes `begin` to `end` of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The weights of an output: header and size of every file, and the slot of every tensor."""

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    slots: Mapping[str, Slot]

    def index(self) -> dict[str, Any] | None:
        """Return the content of model.safetensors.index.json; None where one file holds all."""
        if len(self.headers) < 2:
            return None
        total = sum(slot.end - slot.begin for slot in self.slots.values())
        weight_map = {name: slot.file for name, slot in sorted(self.slots.items())}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}


def plan_layout(tensors: Iterable[tuple[str, tuple[int, ...], str]], shard_bytes: int) -> Layout:
    """Return where tensors will lie.

    Shards are filled in the given order; a tensor that would make one too large begins the next. Within
    a file, tensors of wider entries come first, so that all of them are aligned.

    Args:
        tensors: name, shape and dtype (torch's spelling) of each.
        shard_bytes: size that a shard of several tensors does not exceed; 0 for no limit.
    """
    shards: list[list[tuple[str, tuple[int, ...], str]]] = [[]]
    filled = 0
    for name, shape, dtype in tensors:
        size = _bytes(shape, dtype)
        if shards[-1] and 0 < shard_bytes < filled + size:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape, dtype))
        filled += size
    headers, sizes, slots = {}, {}, {}
    for number, shard in enumerate(shards, 1):
        file = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        ordered = sorted(shard, key=lambda tensor: -STORED[tensor[2]][1])
        headers[file], placed = _header(ordered)
        start = len(headers[file])
        for (name, shape, dtype), (begin, end) in zip(ordered, placed, strict=True):
            slots[name] = Slot(name, shape, dtype, file, start + begin, start + end)
        sizes[file] = start + (placed[-1][1] if placed else 0)
    return Layout(headers, sizes, slots)


def _header(tensors: list[tuple[str, tuple[int, ...], str]]) -> tuple[bytes, list[tuple[int, int]]]:
    entries: dict[str, Any] = {"__metadata__": _METADATA}
    placed = []
    begin = 0
    for name, shape, dtype in tensors:
        end = begin + _bytes(shape, dtype)
        entries[name] = {"dtype": STORED[dtype][0], "shape": list(shape), "data_offsets": [begin, end]}
        placed.append((begin, end))
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The data begins at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, placed


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * STORED[dtype][1]
