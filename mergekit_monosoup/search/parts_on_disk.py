"""The parts of updates in a folder, so that candidates need not be decomposed one by one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_monosoup.spectral.parts import MatrixSplit, Parts

LOG = logging.getLogger(__name__)

_TENSOR = "projection"


class PartsOnDisk:
    """A file a tensor and split rule, up to a number of bytes.

    A float32 copy of the matrices a rule: twice the size of a 16-bit model. Where there is no room, the rule
    that was used longest ago gives way; of the one in use nothing does, since each candidate needs all of it,
    and what does not fit is found again each time. Files are whole or absent: a killed search goes on
    with those there are, and several processes can share the folder.
    """

    def __init__(self, folder: Path, room: int) -> None:
        """Look at what lies in the folder.

        Args:
            folder: for nothing but parts of the updates of one set of checkpoints.
            room: bytes that the files may take.
        """
        self.folder, self.room = folder, room
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._told = False

    @property
    def held(self) -> int:
        """Bytes of the files, of all processes."""
        return sum(size for _, size, _ in self._files())

    def parts(self, tensor: str, rule: str, find: Callable[[], Parts]) -> Parts:
        """Return the parts of a tensor by a rule, from `find` where they are not kept yet."""
        folder = self.folder / _name(rule)
        file = folder / f"{_name(tensor)}.safetensors"
        known = _read(file)
        if known is not None:
            return known
        found = find()
        size = 0 if found.projection is None else found.projection.numel() * found.projection.element_size()
        with self._lock:
            if self._make_room(size, folder):
                _write(file, found)
        return found

    def _make_room(self, size: int, folder: Path) -> bool:
        """Delete what other rules have, longest unused first, until there is room; say whether there is."""
        files = self._files()
        held = sum(taken for _, taken, _ in files)
        used: dict[Path, float] = {}
        for file, _, when in files:
            used[file.parent] = max(when, used.get(file.parent, 0.0))
        for other in sorted(used.keys() - {folder}, key=used.__getitem__):
            if held + size <= self.room:
                break
            held -= sum(taken for file, taken, _ in files if file.parent == other)
            shutil.rmtree(other, ignore_errors=True)
        if held + size <= self.room:
            return True
        if not self._told:
            self._told = True
            LOG.warning("--scratch is full: what has no room there is decomposed for each candidate")
        return False

    def _files(self) -> list[tuple[Path, int, float]]:
        """Return each file with its size and when it was last used."""
        found = []
        for file in self.folder.glob("*/*"):
            # Another process may delete it meanwhile.
            with suppress(FileNotFoundError):
                known = file.stat()
                found.append((file, known.st_size, known.st_mtime))
        return found


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(file: Path) -> Parts | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stream:
            splits = json.loads(stream.metadata()["splits"])
            names = stream.keys()
            projection = stream.get_tensor(_TENSOR) if _TENSOR in names else None
        os.utime(file)
    except (SafetensorError, KeyError, ValueError, OSError):
        # Cut off by a crash of the machine; it is found and written again.
        return None
    return Parts(projection, tuple(None if split is None else MatrixSplit(**split) for split in splits))


def _write(file: Path, parts: Parts) -> None:
    splits = json.dumps([None if split is None else asdict(split) for split in parts.splits])
    tensors = {} if parts.projection is None else {_TENSOR: parts.projection.cpu()}
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(f".{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, partial, {"splits": splits})
        os.replace(partial, file)
    except FileNotFoundError:
        # Another process needs the room.
        LOG.debug("%s was deleted while it was written", partial)
