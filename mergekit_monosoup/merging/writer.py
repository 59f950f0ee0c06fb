"""Write each tensor into its place in the output's files, in any order and from any thread or process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from mergekit.io.tensor_writer import TensorWriter
from torch import Tensor

from mergekit_monosoup.checkpoint.output import gigabytes
from mergekit_monosoup.errors import InputError, OutputError
from mergekit_monosoup.merging.layout import INDEX, Layout

_PIECE = 1 << 22


class Writer:
    """The files of a layout in a folder, at their final size from the beginning."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout

    @classmethod
    def create(cls, folder: Path, layout: Layout) -> Writer:
        """Write all headers and reserve the room for all data.

        Raises:
            OutputError: the disk is too small, or the folder cannot be written to.
        """
        needed = sum(layout.sizes.values())
        for file, header in layout.headers.items():
            with _told(folder / file, needed), (folder / file).open("wb") as stream:
                stream.write(header)
                _reserve(stream.fileno(), layout.sizes[file])
        return cls(folder, layout)

    @classmethod
    def reopen(cls, folder: Path, layout: Layout) -> Writer:
        """Go on with files that `create` has made.

        Raises:
            InputError: a file is not what the layout says.
        """
        for file, header in layout.headers.items():
            path = folder / file
            try:
                with path.open("rb") as stream:
                    same = stream.read(len(header)) == header
                    same = same and os.fstat(stream.fileno()).st_size == layout.sizes[file]
            except OSError:
                same = False
            if not same:
                raise InputError(f"{path} is not what the merge began; begin again with --restart")
        return cls(folder, layout)

    def write(self, name: str, tensor: Tensor) -> str:
        """Write a tensor into its slot and return the SHA-256 of its bytes.

        Raises:
            OutputError: the tensor is not what the layout expects, or cannot be written.
        """
        slot = self._layout.slots[name]
        if tuple(tensor.shape) != slot.shape or str(tensor.dtype).removeprefix("torch.") != slot.dtype:
            raise OutputError(
                f"tensor {name} came out as {tensor.dtype} {tuple(tensor.shape)} where {slot.dtype} "
                f"{slot.shape} was planned; set `out_dtype:` to what the merge method returns"
            )
        digest = hashlib.sha256()
        path = self._folder / slot.file
        with _told(path, slot.end - slot.begin):
            descriptor = os.open(path, os.O_WRONLY)
            try:
                offset = slot.begin
                for piece in _pieces(tensor):
                    digest.update(piece)
                    _write_all(descriptor, piece, offset)
                    offset += len(piece)
            finally:
                os.close(descriptor)
        return digest.hexdigest()

    def stored_hash(self, name: str) -> str:
        """Return the SHA-256 of a tensor's bytes as they lie in the file."""
        slot = self._layout.slots[name]
        return hash_range(self._folder / slot.file, slot.begin, slot.end)

    def finish(self) -> None:
        """Write the index, where there are several files."""
        content = self._layout.index()
        if content is not None:
            with _told(self._folder / INDEX, 0):
                (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


class PickleWriter:
    """Pickled shards by mergekit's own writer; they cannot be written in pieces, so no part is ever kept."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._shards = TensorWriter(str(folder), shard_bytes, safe_serialization=False)

    def write(self, name: str, tensor: Tensor) -> str:
        """Hold a tensor until its shard is full, and return the SHA-256 of its bytes."""
        self._shards.save_tensor(name, tensor, clone=True)
        digest = hashlib.sha256()
        for piece in _pieces(tensor):
            digest.update(piece)
        return digest.hexdigest()

    def stored_hash(self, name: str) -> str:
        """Return no hash: what an interrupted run has left cannot be used."""
        return ""

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._shards.finalize()


def hash_range(path: Path, begin: int, end: int) -> str:
    """Return the SHA-256 of a range of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(begin)
        while begin < end and (piece := stream.read(min(_PIECE, end - begin))):
            digest.update(piece)
            begin += len(piece)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor; no copy of the whole is made where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), _PIECE):
        yield flat[start : start + _PIECE].data


def _write_all(descriptor: int, piece: memoryview, offset: int) -> None:
    while piece:
        count = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[count:], offset + count


def _reserve(descriptor: int, size: int) -> None:
    os.ftruncate(descriptor, size)
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if reserve is not None and size:
        try:
            reserve(descriptor, 0, size)
        except OSError as error:
            # Not every file system can; a full disk then shows when it is written to.
            if error.errno == errno.ENOSPC:
                raise


class _told:
    """Turn what the operating system says of a file that is written into a sentence with a remedy."""

    def __init__(self, path: Path, needed: int) -> None:
        self._path, self._needed = path, needed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            status = os.statvfs(self._path.parent)
            free = gigabytes(status.f_bavail * status.f_frsize)
            raise OutputError(
                f"the disk of {self._path.parent} is full: {self._path.name} needs {gigabytes(self._needed)} "
                f"and {free} are free; make room, or choose another disk"
            ) from error
        raise OutputError(f"{self._path} cannot be written ({error.strerror})") from error
