"""Checkpoints from their headers: names, shapes and dtypes, without a weight being read."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_monosoup.errors import InputError

# safetensors' spelling -> (torch's spelling, bits)
DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}
_LARGEST_HEADER = 100_000_000
_WEIGHTS = "model.safetensors"
_PICKLE = "pytorch_model.bin"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint as its header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    begin: int | None = None
    """Byte at which the data begins in a local file."""

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether the tensor holds floating-point numbers."""
        return self.dtype.startswith(("float", "bfloat"))


@dataclass(frozen=True)
class Checkpoint:
    """An input checkpoint: its configuration and the headers of its tensors."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    folder: Path | None = None
    revision: str | None = None
    adapter: str | None = None
    shapes_known: bool = True
    notes: tuple[str, ...] = field(default=())


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a local safetensors file and compare it with the file's size.

    Raises:
        InputError: damaged header, or a file that is shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(_LARGEST_HEADER, size - 8):
            raise InputError(f"{file} is not a safetensors file, or is cut off; download it again")
        try:
            header = json.loads(stream.read(length))
            return _tensors(header, file.name, 8 + length, size, file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} has a damaged header ({error}); download it again") from error


def _tensors(header: Any, name: str, start: int, size: int, file: Path) -> dict[str, StoredTensor]:
    tensors = {}
    end = start
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        begin, stop = entry["data_offsets"]
        end = max(end, start + stop)
        dtype, _bits = DTYPES.get(entry["dtype"], (entry["dtype"].lower(), 0))
        tensors[key] = StoredTensor(key, tuple(entry["shape"]), dtype, name, start + begin)
    if end > size:
        raise InputError(
            f"{file} is cut off: its header promises {end} bytes and it has {size}; download it again"
        )
    return tensors


def read_folder(name: str, folder: Path, *, with_config: bool = True) -> Checkpoint:
    """Read configuration and headers of a local checkpoint, in the order in which mergekit looks for files.

    Args:
        name: what messages call it.
        folder: where it lies.
        with_config: False for the headers alone.

    Raises:
        InputError: a file is missing or damaged; names it.
    """
    config = read_config(folder) if with_config else {}
    index = folder / f"{_WEIGHTS}.index.json"
    if index.exists():
        return Checkpoint(name, config, _sharded(folder, index), folder)
    if (folder / _WEIGHTS).exists():
        return Checkpoint(name, config, read_safetensors_header(folder / _WEIGHTS), folder)
    if (folder / f"{_PICKLE}.index.json").exists() or (folder / _PICKLE).exists():
        return Checkpoint(name, config, _pickled(folder), folder)
    raise InputError(
        f"{folder} holds no weights: neither {_WEIGHTS} nor {_PICKLE}, nor the index of their shards"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        InputError: missing or not JSON.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{folder} has no config.json; is it a model in transformers' format?") from error
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no configuration; download it again")
    return config


def read_index(index: Path) -> dict[str, str]:
    """Read which shard holds which tensor.

    Raises:
        InputError: not an index.
    """
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(key): str(value) for key, value in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not an index of shards ({error!r}); download it again") from error


def _sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_index(index)
    headers = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            count = sum(s == shard for s in weight_map.values())
            raise InputError(f"{folder / shard} is missing; {index.name} places {count} tensors in it")
        headers[shard] = read_safetensors_header(folder / shard)
    tensors = {}
    for key, shard in weight_map.items():
        if key not in headers[shard]:
            raise InputError(f"tensor {key} is not in {folder / shard}, where {index.name} places it")
        tensors[key] = headers[shard][key]
    return tensors


def _pickled(folder: Path) -> dict[str, StoredTensor]:
    index = folder / f"{_PICKLE}.index.json"
    files = sorted(set(read_index(index).values())) if index.exists() else [_PICKLE]
    tensors = {}
    for name in files:
        if not (folder / name).exists():
            raise InputError(f"{folder / name} is missing; {index.name} names it")
        tensors.update(_read_pickle(folder / name))
    return tensors


def _read_pickle(file: Path) -> dict[str, StoredTensor]:
    # Shapes of pickled weights cannot be had without torch; this is the slow way, and a rare one.
    import torch

    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} cannot be read ({error}); download it again") from error
    return {
        key: StoredTensor(key, tuple(value.shape), str(value.dtype).removeprefix("torch."), file.name)
        for key, value in state.get("state_dict", state).items()
    }


def header_of(file: Path) -> dict[str, StoredTensor]:
    """Read which tensors a file of weights holds, safetensors or pickled.

    Raises:
        InputError: the file is damaged.
    """
    return read_safetensors_header(file) if file.suffix == ".safetensors" else _read_pickle(file)


def bytes_per_entry(dtype: str) -> float:
    """Return the size of an entry of a dtype in torch's spelling."""
    for name, bits in DTYPES.values():
        if name == dtype:
            return bits / 8
    return 2.0


def is_local(path: str) -> bool:
    """Say whether a model path is a folder, which mergekit prefers to a Hub id of the same spelling."""
    return os.path.exists(path)
