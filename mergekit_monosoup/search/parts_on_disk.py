"""The parts of updates in a folder, so that candidates need not be decomposed one by one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_monosoup.spectral.parts import MatrixSplit, Parts

LOG = logging.getLogger(__name__)

_TENSOR = "projection"


class PartsOnDisk:
    """A file a tensor and split rule, up to a number of bytes; what has no room is found again each time.

    A float32 copy of the matrices a rule: twice the size of a 16-bit model. Files are whole or absent, so a
    search that was killed goes on with those there are.
    """

    def __init__(self, folder: Path, room: int) -> None:
        """Look at what lies in the folder.

        Args:
            folder: for nothing but parts of the updates of one set of checkpoints.
            room: bytes that the files may take.
        """
        self._folder, self.room = folder, room
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.part"):
            leftover.unlink()
        self.held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        self._lock = threading.Lock()
        self._told = False

    def parts(self, tensor: str, rule: str, find: Callable[[], Parts]) -> Parts:
        """Return the parts of a tensor by a rule, from `find` where they are not kept yet."""
        file = self._folder / (hashlib.sha256(f"{tensor}\n{rule}".encode()).hexdigest()[:32] + ".safetensors")
        known = _read(file)
        if known is not None:
            return known
        found = find()
        size = 0 if found.projection is None else found.projection.numel() * found.projection.element_size()
        with self._lock:
            fits = self.held + size <= self.room
            self.held += size if fits else 0
            if not fits and not self._told:
                self._told = True
                LOG.warning("--scratch is full: what has no room there is decomposed for each candidate")
        if fits:
            _write(file, found)
        return found

    def clear(self) -> None:
        """Delete all."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _read(file: Path) -> Parts | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stream:
            splits = json.loads(stream.metadata()["splits"])
            names = stream.keys()
            projection = stream.get_tensor(_TENSOR) if _TENSOR in names else None
    except (SafetensorError, KeyError, ValueError, OSError):
        # Cut off by a crash of the machine; it is found and written again.
        return None
    return Parts(projection, tuple(None if split is None else MatrixSplit(**split) for split in splits))


def _write(file: Path, parts: Parts) -> None:
    splits = json.dumps([None if split is None else asdict(split) for split in parts.splits])
    tensors = {} if parts.projection is None else {_TENSOR: parts.projection.cpu()}
    partial = file.with_suffix(".part")
    save_file(tensors, partial, {"splits": splits})
    os.replace(partial, file)
