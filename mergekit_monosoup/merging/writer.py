"""Write each tensor into its place in the output's files, in any order and from any thread or process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from mergekit.io.tensor_writer import TensorWriter
from torch import Tensor

from mergekit_monosoup.checkpoint.output import free_bytes, full_disk, gigabytes, sync, told
from mergekit_monosoup.errors import InputError, OutputError
from mergekit_monosoup.merging.layout import Layout, Slot

# Small enough to stay in a core's cache between hashing and writing, large enough for the disk.
_PIECE = 1 << 22
# What a file system answers that cannot reserve room: a full disk then shows when it is written to.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)


class Writer:
    """The files of one or several layouts in a folder, at their final size from the beginning.

    Holds no open file, so it may be used from several threads and after a fork, and other processes may
    `reopen` the same files and write other tensors meanwhile.
    """

    def __init__(self, folder: Path, layouts: Sequence[Layout]) -> None:
        """Call `create` or `reopen` instead."""
        self.folder = folder
        self._layouts = layouts
        self.slots: Mapping[str, Slot] = {key: s for layout in layouts for key, s in layout.slots.items()}
        if len(self.slots) < sum(len(layout.slots) for layout in layouts):
            raise OutputError("two layouts of the output hold a tensor of the same name")

    @classmethod
    def create(cls, folder: Path, *layouts: Layout) -> Writer:
        """Write all headers, reserve the room for all data, and wait until both are on the disk.

        Raises:
            OutputError: the disk is too small, or the folder cannot be written to; no file is left.
        """
        writer = cls(folder, layouts)
        needed = sum(sum(layout.sizes.values()) for layout in layouts)
        with told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            free = free_bytes(folder)
        if needed > free:
            raise full_disk(folder, f"the weights need {gigabytes(needed)}")
        try:
            for path, header, size in writer._files():
                with told(path, size):
                    path.parent.mkdir(exist_ok=True, parents=True)
                    _create(path, header, size)
            writer.sync()
        except BaseException:
            for path, _, _ in writer._files():
                path.unlink(missing_ok=True)
            raise
        return writer

    @classmethod
    def reopen(cls, folder: Path, *layouts: Layout) -> Writer:
        """Go on with files that `create` has made.

        Raises:
            InputError: a file is not what the layout says.
        """
        writer = cls(folder, layouts)
        for path, header, size in writer._files():
            try:
                with path.open("rb") as stream:
                    same = os.fstat(stream.fileno()).st_size == size and stream.read(len(header)) == header
            except OSError:
                same = False
            if not same:
                raise InputError(f"{path} is not what the merge began with; begin again with --restart")
        return writer

    def write(self, name: str, tensor: Tensor, *, flush: bool = False) -> str:
        """Write a tensor into its slot and return the SHA-256 of its bytes.

        Args:
            name: of the slot.
            tensor: on any device and of any strides; at most a few MB of it are copied at a time.
            flush: wait until its bytes are on the disk, where `sync` is called on another machine.

        Raises:
            OutputError: the tensor is not what the layout expects, or cannot be written.
        """
        slot = self.slots[name]
        _check(slot, name, tensor)
        digest = hashlib.sha256()
        with self._opened(slot, os.O_WRONLY) as descriptor:
            offset = slot.begin
            for piece in pieces(tensor):
                digest.update(piece)
                _write_all(descriptor, piece, offset)
                offset += len(piece)
            if flush:
                os.fsync(descriptor)
        return digest.hexdigest()

    def stored_hash(self, name: str) -> str:
        """Return the SHA-256 of a tensor's bytes as they lie in the file."""
        slot = self.slots[name]
        return hash_range(self.folder / slot.file, slot.begin, slot.end)

    def sync(self) -> None:
        """Wait until what was written so far is on the disk, by whatever process of this machine."""
        folders = {self.folder}
        for path, _, _ in self._files():
            with told(path):
                sync(path)
            folders.add(path.parent)
        for folder in folders:
            with told(folder):
                sync(folder)

    def finish(self) -> None:
        """Write the indexes, where there are several files, and wait until all is on the disk."""
        for layout in self._layouts:
            content = layout.index()
            if content is not None:
                path = self.folder / layout.index_file
                with told(path), path.open("w", encoding="utf-8") as stream:
                    stream.write(json.dumps(content, indent=2) + "\n")
                    stream.flush()
                    os.fsync(stream.fileno())
        self.sync()

    def _files(self) -> Iterator[tuple[Path, bytes, int]]:
        for layout in self._layouts:
            for file, header in layout.headers.items():
                yield self.folder / file, header, layout.sizes[file]

    @contextmanager
    def _opened(self, slot: Slot, flags: int) -> Iterator[int]:
        path = self.folder / slot.file
        with told(path, slot.end - slot.begin):
            # Never through a link, and never into a file that somebody has put there since.
            descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
            try:
                yield descriptor
            finally:
                os.close(descriptor)


class PickleWriter:
    """Pickled shards by mergekit's own writer; they cannot be written in pieces, so no part is ever kept."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._shards = TensorWriter(str(folder), shard_bytes, safe_serialization=False)

    def write(self, name: str, tensor: Tensor) -> str:
        """Hold a tensor until its shard is full, and return the SHA-256 of its bytes."""
        self._shards.save_tensor(name, tensor, clone=True)
        digest = hashlib.sha256()
        for piece in pieces(tensor):
            digest.update(piece)
        return digest.hexdigest()

    def stored_hash(self, name: str) -> str:
        """Return no hash: what an interrupted run has left cannot be used."""
        return ""

    def sync(self) -> None:
        """Do nothing; see `stored_hash`."""

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._shards.finalize()


def hash_range(path: Path, begin: int, end: int) -> str:
    """Return the SHA-256 of a range of a file; of what there is of it, where the file is shorter."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        stream.seek(begin)
        while begin < end and (piece := stream.read(min(_PIECE, end - begin))):
            digest.update(piece)
            begin += len(piece)
    return digest.hexdigest()


def _check(slot: Slot, name: str, tensor: Tensor) -> None:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if dtype == "float4_e2m1fn_x2" and shape:
        shape = (*shape[:-1], 2 * shape[-1])
    if shape != slot.shape or dtype != slot.dtype:
        raise OutputError(
            f"tensor {name} came out as {dtype} {shape} where {slot.dtype} {slot.shape} was planned; set "
            "`out_dtype:` to what the merge method returns"
        )


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row-major order, copying no more than a piece at a time."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), _PIECE):
            yield flat[start : start + _PIECE].data
    elif tensor.ndim == 0 or tensor.numel() * tensor.element_size() <= _PIECE:
        yield from pieces(tensor.cpu().contiguous())
    else:
        rows = max(1, _PIECE * len(tensor) // (tensor.numel() * tensor.element_size()))
        for start in range(0, len(tensor), rows):
            part = tensor[start : start + rows]
            yield from pieces(part[0] if rows == 1 else part.cpu().contiguous())


def _write_all(descriptor: int, piece: memoryview, offset: int) -> None:
    while piece:
        count = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[count:], offset + count


def _create(path: Path, header: bytes, size: int) -> None:
    # A new file, not the old one: what lies there may be a link, or be mapped by a reader.
    path.unlink(missing_ok=True)
    with path.open("xb") as stream:
        stream.write(header)
        stream.flush()
        os.ftruncate(stream.fileno(), size)
        reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
        if reserve is None:
            return
        try:
            reserve(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
