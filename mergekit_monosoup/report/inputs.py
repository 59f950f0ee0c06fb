"""Which files went into a merge: revisions and hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from mergekit_monosoup.report.schema import InputFile, InputModel

_SUFFIXES = (".safetensors", ".bin", ".json")
_CHUNK = 1 << 22
_SHA256_DIGITS = 64


class InputHashes:
    """Identify the files of input checkpoints while the merge goes on.

    Files in the Hub's cache are named by their hash there and are not read; others are hashed in
    background threads (hashlib releases the interpreter's lock).
    """

    def __init__(self, models: Iterable[tuple[str, Literal["base", "finetuned"], Path]]) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="monosoup-hash")
        self._models = [
            (name, role, folder, self._files(folder)) for name, role, folder in models if folder.exists()
        ]

    def _files(self, folder: Path) -> dict[str, tuple[int, Future[str | None] | str]]:
        files: dict[str, tuple[int, Future[str | None] | str]] = {}
        for file in [folder] if folder.is_file() else sorted(folder.iterdir()):
            if file.suffix in _SUFFIXES and file.is_file():
                known = _cached_sha256(file)
                digest = known if known is not None else self._pool.submit(_sha256, file)
                files[file.name] = (file.stat().st_size, digest)
        return files

    def result(self) -> tuple[InputModel, ...]:
        """Wait for the hashes and return the inputs."""
        done = []
        for name, role, folder, files in self._models:
            entries = {
                file: InputFile(size=size, sha256=digest if isinstance(digest, str) else digest.result())
                for file, (size, digest) in files.items()
            }
            done.append(InputModel(model=name, role=role, revision=cached_revision(folder), files=entries))
        self._pool.shutdown()
        return tuple(done)

    def cancel(self) -> None:
        """Drop the files that are not hashed yet."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def cached_revision(folder: Path) -> str | None:
    """Return the commit of a snapshot in the Hub's cache (.../snapshots/<commit>), None elsewhere."""
    return folder.name if folder.parent.name == "snapshots" else None


def _cached_sha256(file: Path) -> str | None:
    """Return the hash that names a large file in the Hub's cache (.../blobs/<sha256>)."""
    if not file.is_symlink():
        return None
    blob = Path(os.path.realpath(file))
    return blob.name if blob.parent.name == "blobs" and len(blob.name) == _SHA256_DIGITS else None


def _sha256(file: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        # An audit must not fail a merge whose own reads have succeeded; the field stays null.
        return None
    return digest.hexdigest()
