"""Checkpoints from their headers: names, shapes and dtypes, without a weight being read."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.documents import read_config, read_index, shown
from mergekit_monosoup.checkpoint.ranges import RemoteWeights
from mergekit_monosoup.checkpoint.safetensors_file import DTYPES, read_entries
from mergekit_monosoup.errors import InputError

_WEIGHTS = "model.safetensors"
_PICKLE = "pytorch_model.bin"


__all__ = [
    "DTYPES",
    "Checkpoint",
    "StoredTensor",
    "bytes_per_entry",
    "header_of",
    "is_local",
    "load_pickle",
    "read_config",
    "read_folder",
    "read_index",
    "read_safetensors_header",
    "unreadable_pickle",
]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint as its header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    begin: int | None = None
    """Byte at which the data begins in a local file; behind the header, in a file on the Hub."""
    stored: str | None = None
    """Name in the file, where the checkpoint's tensors have been given others."""

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
    """Where it lies with its weights; None where these are on the Hub."""
    revision: str | None = None
    adapter: str | None = None
    touched: frozenset[str] | None = None
    """Tensors that the adapter changes; None where there is none, or that is not known."""
    shapes_known: bool = True
    renamed: bool = False
    """Whether the names of the tensors are others than those in the files."""
    notes: tuple[str, ...] = field(default=())
    fetched: Path | None = None
    """Folder of the small files of a model whose weights are on the Hub: tokenizer, card, modules."""
    remote: RemoteWeights | None = None
    """The weights on the Hub."""

    @property
    def beside(self) -> Path | None:
        """Where what lies beside the weights can be read."""
        return self.folder if self.folder is not None else self.fetched


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a local safetensors file and compare it with the file's size.

    Raises:
        InputError: damaged header, or a file that is shorter or longer than its header says.
    """
    start, entries = read_entries(file)
    return {
        key: StoredTensor(key, entry.shape, entry.dtype, file.name, start + entry.begin)
        for key, entry in entries.items()
    }


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


def _sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_index(index)
    headers = {}
    for shard, count in sorted(Counter(weight_map.values()).items()):
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard} is missing; {index.name} places {count} tensors in it")
        headers[shard] = read_safetensors_header(folder / shard)
    tensors = {}
    for key, shard in weight_map.items():
        if key not in headers[shard]:
            raise InputError(f"tensor {shown(key)} is not in {folder / shard}, where {index.name} places it")
        tensors[key] = headers[shard][key]
    return tensors


def _pickled(folder: Path) -> dict[str, StoredTensor]:
    index = folder / f"{_PICKLE}.index.json"
    files = sorted(set(read_index(index).values())) if index.exists() else [_PICKLE]
    tensors = {}
    for name in files:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing; {index.name} names it")
        tensors.update(_read_pickle(folder / name))
    return tensors


def _read_pickle(file: Path) -> dict[str, StoredTensor]:
    # Shapes of pickled weights cannot be had without torch; this is the slow way, and a rare one.
    return {
        key: StoredTensor(key, tuple(value.shape), str(value.dtype).removeprefix("torch."), file.name)
        for key, value in load_pickle(file, map_location="meta").items()
    }


def load_pickle(file: Path, map_location: str = "cpu") -> dict[str, Any]:
    """Return the tensors of a pickled file, mapped from the disk where its format allows it.

    Raises:
        InputError: it holds code or other things than tensors, or is damaged.
    """
    import torch

    state: Any = None
    for mapped in (True, False):
        try:
            state = torch.load(file, map_location=map_location, weights_only=True, mmap=mapped)
            break
        except RuntimeError as error:
            # Files in the format before torch 1.6 cannot be mapped.
            if not mapped or "mmap" not in str(error):
                raise unreadable_pickle(file, error) from error
        except (pickle.UnpicklingError, OSError, ValueError, EOFError, LookupError) as error:
            raise unreadable_pickle(file, error) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise InputError(f"{file} holds other things than tensors; save the weights alone, as safetensors")
    return state


def unreadable_pickle(file: Path, error: Exception) -> InputError:
    """Return the error for a pickled file that cannot be read as plain tensors."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is not None:
        return InputError(
            f"{file} is a pickle that would run code as it is loaded ({code[1]}); it was not loaded: use "
            "weights in safetensors, from somebody you trust"
        )
    reason = "it is damaged" if isinstance(error, pickle.UnpicklingError) else str(error).split("\n")[0]
    return InputError(f"{file} cannot be read as plain tensors ({reason}); download it again")


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
