"""The folder of a result: whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import filelock

from mergekit_monosoup.checkpoint.output import JOURNAL, PARTIAL, partial_of, refuse_occupied, sync, told
from mergekit_monosoup.errors import ConfigurationError, OutputError

LOG = logging.getLogger(__name__)

_RESULT = "model"
_REPLACED = "replaced"
_MOVING = "moving"
_LOCK = "lock"


class WorkFolder:
    """A folder beside the result in which it is made; nobody else works there meanwhile.

        OUT.partial/model          the result on its way; takes the place of OUT by one rename
        OUT.partial/monosoup_journal.jsonl  what of it is done
        OUT.partial/replaced       what OUT held, between the two renames of `finish`
        OUT.partial/lock           the operating system's: a dead process holds none

    Where a folder cannot be renamed (a mount point, the working directory, one in a folder that may not be
    written to), `.partial` lies in it, and its entries are moved one by one. A process that dies while
    moving leaves enough for the next call of `open` to put everything back to where it was before.
    """

    def __init__(self, out: Path, *, resumable: bool = True) -> None:
        """Say where the result goes; nothing is touched yet. A link stays a link: its target is replaced.

        Args:
            out: the folder of the result.
            resumable: whether the command has `--resume` and `--restart`; else it names what is left of an
                interrupted run, and its user removes that.
        """
        self.out = Path(os.path.realpath(out))
        beside, within = partial_of(self.out), self.out / PARTIAL
        # What is left of an interrupted run says where it worked.
        self._within = not beside.exists() and (within.exists() or not _can_be_renamed(self.out))
        self.root = within if self._within else beside
        self.path = self.root / _RESULT
        self.journal = self.root / JOURNAL
        self._replaced = self.root / _REPLACED
        self._moving = self.root / _MOVING
        self._resumable = resumable
        self._lock = filelock.FileLock(self.root / _LOCK, timeout=0)

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
        # Nothing is created where the answer is no.
        if not self.root.exists():
            refuse_occupied(self.out, overwrite)
        with told(self.root):
            self._take()
        try:
            with told(self.root):
                self._put_back()
            refuse_occupied(self.out, overwrite)
            return self._left(resume, restart)
        except BaseException:
            self._let_go()
            raise

    def _left(self, resume: bool, restart: bool) -> bool:
        with told(self.root):
            begun = self.journal.exists() and self.path.exists()
            if begun and resume:
                return True
            blank = self._only({_RESULT}) and not (self.path.exists() and any(self.path.iterdir()))
            if not blank and not self._resumable:
                raise ConfigurationError(
                    f"{self.root} is what an interrupted command has left; remove it if nobody goes on with "
                    "it, or choose another output folder"
                )
            if not blank and not resume and not restart:
                raise ConfigurationError(
                    f"{self.root} is what an interrupted merge has left; pass --resume to go on with it, or "
                    "--restart to delete it and begin again"
                )
            if not restart and not self._only({_RESULT}):
                raise ConfigurationError(
                    f"{self.root} does not say what was begun; pass --restart to delete it and begin again"
                )
            # Without a journal nobody can go on with what lies there.
            self._empty()
            self.path.mkdir()
        return False

    def _only(self, names: set[str]) -> bool:
        """Say whether the folder holds nothing but what a work folder may hold, and of that only `names`."""
        return {entry.name for entry in self.root.iterdir()} <= {*names, _LOCK}

    def _take(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout as error:
            raise OutputError(
                f"another merge is writing to {self.root}; wait for it, or choose another output folder"
            ) from error

    def finish(self) -> None:
        """Bring everything to the disk and move the result into its place.

        Raises:
            OutputError: the place cannot be written to; the result stays where it was made.
        """
        with told(self.out):
            _sync_tree(self.path)
            sync(self.root)
            try:
                self._move_entries() if self._within else self._move_folder()
            except BaseException:
                self._put_back()
                raise
        self._let_go(everything=True)

    def abandon(self, *, keep: bool) -> None:
        """Let go of the folder: of all that is in it too, unless it is to be kept to go on with."""
        self._let_go(everything=not keep)

    def _move_folder(self) -> None:
        if self.out.exists():
            shutil.copymode(self.out, self.path)
            os.rename(self.out, self._replaced)
        os.rename(self.path, self.out)
        sync(self.out.parent)

    def _move_entries(self) -> None:
        self._replaced.mkdir(exist_ok=True)
        _move(self.out, self._replaced)
        self._moving.touch()
        sync(self.root)
        _move(self.path, self.out)
        sync(self.out)
        self.path.rmdir()
        self._moving.unlink()
        sync(self.root)

    def _put_back(self) -> None:
        """Undo the moves of a process that died before the last of them, else clear away."""
        if self.path.exists():
            if self._within:
                self._put_entries_back()
            elif self._replaced.exists():
                self._put_folder_back()
        elif self._replaced.exists() and not self.out.exists():
            os.rename(self._replaced, self.out)
        elif self.out.exists() and self._only({_REPLACED, _MOVING, JOURNAL}):
            self._empty()

    def _put_entries_back(self) -> None:
        if self._moving.exists():
            # Only what is new lies in the result's place.
            _move(self.out, self.path)
            self._moving.unlink()
        if self._replaced.exists():
            _move(self._replaced, self.out)
            self._replaced.rmdir()

    def _put_folder_back(self) -> None:
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()
        if self.out.exists():
            raise ConfigurationError(
                f"a merge was interrupted while it replaced {self.out}, where something lies again; what it "
                f"held is in {self._replaced} and the new result in {self.path}: move one of them away"
            )
        os.rename(self._replaced, self.out)
        sync(self.out.parent)

    def _empty(self) -> None:
        for entry in sorted(self.root.iterdir()):
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _let_go(self, everything: bool = False) -> None:
        """Release the lock, and remove the folder with all that is in it or where there is nothing in it."""
        try:
            with told(self.root):
                if everything:
                    self._empty()
                if all(entry.name == _LOCK for entry in self.root.iterdir()):
                    # While it is still held: whoever waits for it sees that it lies nowhere any more.
                    (self.root / _LOCK).unlink(missing_ok=True)
                    _remove_if_empty(self.root)
        finally:
            self._lock.release()


def _can_be_renamed(out: Path) -> bool:
    if not out.is_dir():
        return True
    here = Path.cwd().resolve()
    inside = out == here or out in here.parents
    return not (os.path.ismount(out) or inside or not os.access(out.parent, os.W_OK))


def _move(source: Path, target: Path) -> None:
    """Move a folder's entries into another; config.json last, without which none is a model."""
    entries = [entry for entry in source.iterdir() if entry.name != PARTIAL]
    for entry in sorted(entries, key=lambda entry: (entry.name == "config.json", entry.name)):
        os.replace(entry, target / entry.name)
    sync(target)
    sync(source)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        LOG.debug("%s is in use by somebody else", folder)


def _sync_tree(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for name in files:
            if not (Path(path) / name).is_symlink():
                sync(Path(path) / name)
        sync(Path(path))
