"""The folder of a result: whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import filelock

from mergekit_monosoup.checkpoint.output import LOCK, left_behind, occupied, partial_of
from mergekit_monosoup.errors import ConfigurationError, OutputError
from mergekit_monosoup.merging import journal

LOG = logging.getLogger(__name__)

# What is left in a result where the process dies between its rename and the end.
LEFTOVERS = (LOCK, journal.NAME)


class WorkFolder:
    """A folder beside the result in which it is made; nobody else works there meanwhile.

    `OUT.partial` becomes `OUT` by one rename when all is done and on the disk. What `OUT` held until then is
    kept beside it until the new result stands. The lock is the operating system's: a dead process holds none.
    """

    def __init__(self, out: Path) -> None:
        # A link stays a link: its target is what gets replaced.
        self.out = out.resolve() if out.is_symlink() else out.absolute()
        self.path = partial_of(self.out)
        self._before = self.out.with_name(self.out.name + ".before")
        self._lock = filelock.FileLock(self.path / LOCK, timeout=0)

    def open(self, *, overwrite: bool = False, resume: bool = False, restart: bool = False) -> bool:
        """Take the folder; return whether it holds what an interrupted merge has left, to go on with.

        Args:
            overwrite: the result may replace what lies in its place.
            resume: go on with what is left.
            restart: delete what is left.

        Raises:
            ConfigurationError: the result's place is taken, or something is left and neither was asked for.
            OutputError: another merge is at work here, or the folder cannot be written to.
        """
        self._put_back()
        message = occupied(self.out, overwrite=overwrite)
        if message is not None:
            raise ConfigurationError(message)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout as error:
            raise OutputError(
                f"another merge is writing to {self.path}; wait for it, or choose another output folder"
            ) from error
        except OSError as error:
            raise OutputError(f"folder {self.path} cannot be written to ({error.strerror})") from error
        left = any(entry.name != LOCK for entry in self.path.iterdir())
        if left and not resume and not restart:
            self._lock.release()
            raise ConfigurationError(str(left_behind(self.out)))
        if left and restart:
            self._empty()
            left = False
        return left

    def finish(self) -> None:
        """Bring everything to the disk and move the result into its place.

        Raises:
            OutputError: the place cannot be written to.
        """
        try:
            _sync_tree(self.path)
            if self.out.exists():
                # Killed between these two renames, the next call puts the old result back.
                os.rename(self.out, self._before)
            os.rename(self.path, self.out)
        except OSError as error:
            raise OutputError(
                f"{self.path} holds the finished result and cannot be moved to {self.out} ({error.strerror})"
            ) from error
        self._lock.release()
        for name in LEFTOVERS:
            (self.out / name).unlink(missing_ok=True)
        _sync(self.out)
        _sync(self.out.parent)
        if self._before.exists():
            shutil.rmtree(self._before)

    def abandon(self, *, keep: bool) -> None:
        """Let go of the folder: of all that is in it too, unless it is to be kept to go on with."""
        if not keep and self.path.is_dir():
            self._empty()
        self._lock.release()
        if not keep:
            (self.path / LOCK).unlink(missing_ok=True)
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _put_back(self) -> None:
        if not self._before.exists():
            return
        if self.out.exists():
            LOG.warning("removing %s, which %s has replaced", self._before, self.out)
            shutil.rmtree(self._before)
        else:
            os.rename(self._before, self.out)


def _sync_tree(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for name in files:
            _sync(Path(path) / name)
        _sync(Path(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
