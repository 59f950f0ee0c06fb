"""Whether a merged model is whole, and what its report says it is."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_monosoup.checkpoint.headers import DTYPES, read_config, read_index
from mergekit_monosoup.checkpoint.output import PARTIAL
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.merging.writer import hash_range
from mergekit_monosoup.report.reader import FILE_NAME, read_report

# Tensors in the order of their names, and their hashes when computed again.
Recompute = Callable[[list[str]], Iterable[tuple[str, str]]]

_WEIGHTS = "model"
_SHARD = re.compile(r"(?P<stem>.+?)(-\d+-of-\d+)?\.safetensors")
_INDEX = ".safetensors.index.json"
_PIECE = 1 << 22
_AGAIN = "run the merge again"


class _Entry(NamedTuple):
    """One tensor of a file: bytes `begin` to `end`."""

    begin: int
    end: int
    name: str
    dtype: str
    size: int


@dataclass
class Verification:
    """What was looked at in a folder, and what is wrong with it."""

    tensors: int = 0
    parameters: int = 0
    hashed: int = 0
    recomputed: int = 0
    problems: list[str] = field(default_factory=list)


def verify_folder(
    folder: Path,
    *,
    recompute: Recompute | None = None,
    count: int = 0,
    seed: int = 0,
    seen: Callable[[str, int], None] = lambda name, size: None,
) -> Verification:
    """Look at a merged model: files, index, values and hashes.

    Everything that is wrong is found, not only the first. Nothing is loaded whole: memory does not depend on
    the size of tensors.

    Args:
        folder: of the model.
        recompute: computes tensors again from the inputs of the merge and gives the hash of each.
        count: how many to compute again.
        seed: which.
        seen: called for each tensor that is looked at, with its name and number of bytes.
    """
    found = Verification()
    if not folder.is_dir():
        found.problems.append(f"{folder} is not a folder; name the output of a merge")
    elif folder.name.endswith(PARTIAL) or folder.absolute().parent.name.endswith(PARTIAL):
        found.problems.append(f"{folder} is an unfinished merge; go on with it by --resume")
    else:
        _Check(folder, found, seen).run(recompute, count, seed)
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, of its sub-folders too, but for hidden ones."""
    files = (path for path in folder.rglob("*.safetensors") if path.is_file())
    return sorted(f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts))


class _Check:
    """One look at a folder."""

    def __init__(self, folder: Path, found: Verification, seen: Callable[[str, int], None]) -> None:
        self._folder, self._found, self._seen = folder, found, seen
        # Both by the name in the report.
        self._expected: dict[str, str] = {}
        self._places: dict[str, tuple[Path, _Entry]] = {}

    def run(self, recompute: Recompute | None, count: int, seed: int) -> None:
        self._config()
        self._report()
        folders = {path.parent for path in self._folder.rglob(f"*{_INDEX}")}
        folders |= {path.parent for path in weight_files(self._folder)}
        for folder in sorted({self._folder, *folders}):
            if not any(part.startswith(".") for part in folder.relative_to(self._folder).parts):
                self._set(folder)
        for name in sorted(set(self._expected) - set(self._places)):
            self._note(f"tensor {name} is missing, and {FILE_NAME} says that it was written; {_AGAIN}")
        if recompute is not None and count > 0 and not self._found.problems:
            self._recompute(recompute, count, seed)

    def _note(self, problem: str) -> None:
        # Names come from files of anybody: one problem is one line, whatever stands in them.
        self._found.problems.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in problem))

    def _config(self) -> None:
        file = self._folder / "config.json"
        try:
            _regular(file)
            _load_config(self._folder)
        except InputError as error:
            self._note(str(error))

    def _report(self) -> None:
        file = self._folder / FILE_NAME
        if not os.path.lexists(file):
            return
        try:
            _regular(file)
            records = read_report(file).records
        except (InputError, OSError, ValueError, RecursionError) as error:
            self._note(_sentence(file, error))
            return
        self._expected = {record.tensor: record.sha256 for record in records if record.sha256 is not None}

    def _set(self, folder: Path) -> None:
        """Look at the weights of one folder: each file, or each index with its shards."""
        stems: dict[str, set[str]] = {}
        for file in folder.glob("*.safetensors"):
            match = _SHARD.fullmatch(file.name)
            if match is not None:
                stems.setdefault(match["stem"], set()).add(file.name)
        for index in folder.glob(f"*{_INDEX}"):
            stems.setdefault(index.name[: -len(_INDEX)], set())
        if folder == self._folder and _WEIGHTS not in stems:
            pickled = sorted(folder.glob("pytorch_model*.bin"))
            if pickled:
                self._note(f"{pickled[0]} is pickled; only safetensors files can be verified: merge again")
            else:
                self._note(f"{folder} holds no weights: there is neither {_WEIGHTS}.safetensors nor an index")
        for stem, files in sorted(stems.items()):
            index = folder / f"{stem}{_INDEX}"
            if os.path.lexists(index):
                self._sharded(index, stem, files)
                continue
            single = f"{stem}.safetensors"
            for name in sorted(files - {single}):
                self._note(f"{folder / name} is not in an index; remove it if it is of another merge")
            if single in files:
                self._file(folder / single, stem, None)

    def _sharded(self, index: Path, stem: str, files: set[str]) -> None:
        try:
            _regular(index)
            placed = read_index(index)
        except (InputError, OSError, RecursionError) as error:
            self._note(_sentence(index, error))
            return
        by_file: dict[str, set[str]] = {}
        for name, file in placed.items():
            by_file.setdefault(file, set()).add(name)
        for file, names in sorted(by_file.items()):
            path = index.parent / file
            if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                self._note(f"{index} places tensor {min(names)} in {file!r}, which is no shard; {_AGAIN}")
            elif not os.path.lexists(path):
                self._note(f"{path} is missing; {index.name} places {len(names)} tensors in it; {_AGAIN}")
            else:
                self._file(path, stem, names)
        for file in sorted(files - set(by_file)):
            self._note(f"{index.parent / file} is not in the index; remove it if it is of another merge")

    def _file(self, path: Path, stem: str, names: set[str] | None) -> None:
        """Look at one file, and compare with what an index says of it."""
        try:
            _regular(path)
            entries = _entries(path)
        except InputError as error:
            self._note(str(error))
            return
        held = {entry.name for entry in entries}
        for name in sorted(names - held) if names is not None else ():
            self._note(f"tensor {name} is not in {path}, where the index places it; {_AGAIN}")
        for name in sorted(held - names) if names is not None else ():
            self._note(f"the index does not list tensor {name} of {path}; {_AGAIN}")
        if not held and names is None:
            self._note(f"{path} holds no tensors; {_AGAIN}")
        try:
            with path.open("rb", buffering=0) as stream:
                for batch in _batches(entries):
                    self._batch(path, stem, stream, batch)
        except OSError as error:
            self._note(_sentence(path, error))

    def _batch(self, path: Path, stem: str, stream: IO[bytes], batch: list[_Entry]) -> None:
        prefix = path.parent.relative_to(self._folder).as_posix()
        prefix = "" if prefix == "." else f"{prefix}/"
        hashed = bool(self._expected) and stem == _WEIGHTS
        digests = [hashlib.sha256() for _ in batch]
        finite = True
        for piece in _pieces(stream, batch[0].begin, batch[-1].end):
            finite = finite and _is_finite(piece, batch[0].dtype)
            if hashed and len(batch) == 1:
                digests[0].update(piece)
            for entry, digest in zip(batch, digests, strict=True) if hashed and len(batch) > 1 else ():
                digest.update(piece[entry.begin - batch[0].begin : entry.end - batch[0].begin])
        if not finite and len(batch) > 1:
            # Only now is it worth the time to ask each.
            for entry in batch:
                self._batch(path, stem, stream, [entry])
            return
        for entry, digest in zip(batch, digests, strict=True):
            if not finite:
                self._note(f"tensor {entry.name} in {path} holds NaN or infinity; nobody can use it")
            self._found.tensors += 1
            self._found.parameters += entry.size
            if stem == _WEIGHTS:
                self._places[prefix + entry.name] = path, entry
            if hashed:
                self._compare(path, prefix + entry.name, digest.hexdigest())
            self._seen(entry.name, entry.end - entry.begin)

    def _compare(self, path: Path, key: str, sha256: str) -> None:
        expected = self._expected.get(key)
        if expected is None:
            self._note(f"tensor {key} in {path} is not in {FILE_NAME}; {_AGAIN}")
            return
        self._found.hashed += 1
        if expected != sha256:
            self._note(f"tensor {key} in {path} is not what {FILE_NAME} says was written; {_AGAIN}")

    def _recompute(self, recompute: Recompute, count: int, seed: int) -> None:
        # Modules in sub-folders are no units of a run.
        names = sorted(name for name in self._places if "/" not in name)
        chosen = random.Random(seed).sample(names, min(count, len(names)))
        missing = set(chosen)
        for name, sha256 in recompute(chosen):
            missing.discard(name)
            path, entry = self._places[name]
            self._found.recomputed += 1
            if hash_range(path, entry.begin, entry.end) != sha256:
                self._note(f"tensor {name} in {path} is not what the inputs give when it is computed again")
        for name in sorted(missing):
            self._note(f"tensor {name} is not what the recipe writes: it cannot be computed again")


def _sentence(path: Path, error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{path} cannot be read ({error}); {_AGAIN}"


def _regular(path: Path) -> None:
    """Refuse what is no file, before reading it could block or never end."""
    if not path.is_file():
        raise InputError(f"{path} is not a file" if os.path.lexists(path) else f"{path} is missing; {_AGAIN}")


def _load_config(folder: Path) -> None:
    file = folder / "config.json"
    try:
        config = read_config(folder)
    except RecursionError as error:
        raise InputError(f"{file} is not valid JSON ({error})") from error
    if "auto_map" in config:
        # Of a model with code of its own, which is not run here.
        return
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"{file} cannot be loaded by transformers: {error}") from error


def _entries(path: Path) -> list[_Entry]:
    """Return the tensors of a file in the order of their bytes, after safetensors has checked its header."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            # Entry by entry as they are parsed: a million of them as objects of JSON are gigabytes.
            header = json.loads(stream.read(length), object_hook=_compact)
    except (SafetensorError, OSError, ValueError, OverflowError, struct.error) as error:
        raise InputError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    header.pop("__metadata__", None)
    start = 8 + length
    return sorted(
        _Entry(start + begin, start + end, name, dtype, size)
        for name, (begin, end, dtype, size) in header.items()
    )


def _compact(value: dict[str, Any]) -> Any:
    """Return bytes, dtype and size for the description of a tensor; anything else as it is."""
    if not value.keys() >= {"dtype", "shape", "data_offsets"} or not isinstance(value["shape"], list):
        return value
    begin, end = value["data_offsets"]
    return begin, end, sys.intern(value["dtype"]), math.prod(value["shape"])


def _batches(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    """Yield neighbours of one dtype that are read in one piece, or one tensor."""
    batch: list[_Entry] = []
    for entry in entries:
        if batch and (entry.dtype != batch[0].dtype or entry.end - batch[0].begin > _PIECE):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _pieces(stream: IO[bytes], begin: int, end: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_PIECE, end - begin)))
    stream.seek(begin)
    while begin < end:
        part = buffer[: end - begin]
        filled = 0
        while filled < len(part):
            count = stream.readinto(part[filled:])  # type: ignore[attr-defined]
            if not count:
                raise OSError(None, "it is shorter than its header says")
            filled += count
        yield part
        begin += len(part)


def _is_finite(piece: memoryview, dtype: str) -> bool:
    torch_dtype = getattr(torch, DTYPES.get(dtype, ("", 0))[0], None)
    if torch_dtype is None or not torch_dtype.is_floating_point or dtype == "F4":
        return True
    values = torch.frombuffer(piece, dtype=torch_dtype) if len(piece) else torch.empty(0)
    return bool(torch.isfinite(_widened(values)).all())


def _widened(values: Tensor) -> Tensor:
    # isfinite knows no float8.
    return values.float() if values.element_size() == 1 else values
