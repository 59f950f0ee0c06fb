"""Where each tensor of the output lies: files, headers and byte ranges, before the first is computed."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergekit_monosoup.checkpoint.headers import DTYPES
from mergekit_monosoup.errors import OutputError

WEIGHTS = "model"
# The order in which safetensors places tensors, then by name: the widest first, so that all are aligned.
_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F4", "BOOL"),
)
# torch's spelling -> (place in that order, safetensors' spelling, bits an entry)
_STORED = {name: (_ORDER.index(spelt), spelt, bits) for spelt, (name, bits) in DTYPES.items()}
# safetensors refuses to read a header that is longer.
_LARGEST_HEADER = 100_000_000
_as_json = json.JSONEncoder(ensure_ascii=False).encode


class Slot(NamedTuple):
    """One tensor's place: bytes `begin` to `end` of a file.

    `shape` is that of the header: entries, of which float4_e2m1fn_x2 holds two a byte.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    begin: int
    end: int


class _Planned(NamedTuple):
    """A tensor without a place yet; compares in safetensors' order."""

    rank: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    described: str


@dataclass(frozen=True)
class Layout:
    """The weights of one folder: header and size of every file, and the slot of every tensor.

    Files are relative to the folder of the model. Slots are found by the tensor's name, in a sub-folder
    (`2_Dense`) by `2_Dense/name`: so the slots of several layouts can stand in one table.
    """

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    slots: Mapping[str, Slot]
    folder: str = ""
    basename: str = WEIGHTS

    def index(self) -> dict[str, Any] | None:
        """Return the content of the index of shards; None where one file holds all."""
        if len(self.headers) < 2:
            return None
        total = sum(slot.end - slot.begin for slot in self.slots.values())
        start = len(_prefix(self.folder))
        weight_map = {slot.name: slot.file[start:] for _, slot in sorted(self.slots.items())}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    @property
    def index_file(self) -> str:
        """The path of the index of shards."""
        return f"{_prefix(self.folder)}{self.basename}.safetensors.index.json"

    def digest(self) -> str:
        """Return a hash of all files' names, headers and sizes."""
        digest = hashlib.sha256()
        for file in sorted(self.headers):
            digest.update(f"{file}\n{self.sizes[file]}\n".encode())
            digest.update(self.headers[file])
        return digest.hexdigest()


def plan_layout(
    tensors: Iterable[tuple[str, tuple[int, ...], str]],
    shard_bytes: int,
    *,
    folder: str = "",
    basename: str = WEIGHTS,
) -> Layout:
    """Return where tensors will lie.

    Shards are filled in the given order, as mergekit fills them: a tensor that would make one larger than
    `shard_bytes` begins the next. The files are those that `safetensors.torch.save_file` would write.

    Args:
        tensors: name, shape and dtype (torch's spelling) of each.
        shard_bytes: size that the data of a shard of several tensors does not exceed; 0 for no limit.
        folder: sub-folder of the model that the files lie in (`2_Dense`), with `/` between its parts.
        basename: what the names of the files begin with.

    Raises:
        OutputError: a name, shape or dtype that no safetensors file can hold, or a name that comes twice.
    """
    shards = _filled(map(_planned, tensors), shard_bytes)
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    slots: dict[str, Slot] = {}
    prefix = _prefix(folder)
    for number, shard in enumerate(shards, 1):
        stem = f"{basename}-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else basename
        file = f"{prefix}{stem}.safetensors"
        shard.sort()
        headers[file] = _header(shard)
        end = len(headers[file])
        for tensor in shard:
            begin, end = end, end + tensor.size
            if prefix + tensor.name in slots:
                raise OutputError(f"tensor {tensor.name!r} comes twice in the output")
            slots[prefix + tensor.name] = Slot(tensor.name, tensor.shape, tensor.dtype, file, begin, end)
        sizes[file] = end
    return Layout(headers, sizes, slots, folder, basename)


def _planned(tensor: tuple[str, tuple[int, ...], str]) -> _Planned:
    name, shape, dtype = tensor
    if dtype not in _STORED:
        raise OutputError(f"tensor {name!r} is {dtype}, which safetensors cannot hold; set `out_dtype:`")
    rank, spelt, bits = _STORED[dtype]
    size, rest = divmod(math.prod(shape) * bits, 8)
    if rest or min(shape, default=0) < 0:
        raise OutputError(f"tensor {name!r} of {dtype} cannot have the shape {list(shape)}")
    if name == "__metadata__" or not _is_text(name):
        raise OutputError(f"{name!r} cannot be the name of a tensor in a safetensors file; rename it")
    described = f'{_as_json(name)}:{{"dtype":"{spelt}","shape":[{",".join(map(str, shape))}]'
    return _Planned(rank, name, tuple(shape), dtype, size, described)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _filled(tensors: Iterable[_Planned], shard_bytes: int) -> list[list[_Planned]]:
    shards: list[list[_Planned]] = [[]]
    data, header = 0, 0
    for tensor in tensors:
        # With the offsets, of 20 digits at most, and what stands between.
        described = len(tensor.described.encode()) + 64
        full = 0 < shard_bytes < data + tensor.size or header + described > _LARGEST_HEADER - 64
        if shards[-1] and full:
            shards.append([])
            data, header = 0, 0
        shards[-1].append(tensor)
        data += tensor.size
        header += described
    return shards


def _header(tensors: Iterable[_Planned]) -> bytes:
    parts = ['{"__metadata__":{"format":"pt"}']
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        parts.append(f'{tensor.described},"data_offsets":[{begin},{end}]}}')
    text = (",".join(parts) + "}").encode()
    # The data begins at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _prefix(folder: str) -> str:
    return f"{folder}/" if folder else ""
