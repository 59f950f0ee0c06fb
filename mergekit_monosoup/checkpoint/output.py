"""The folder that a command will write to: whether it is taken, and what the disk says."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_monosoup.errors import ConfigurationError, OutputError

# Beside the result while it is made, so that moving it into place never crosses a file system.
PARTIAL = ".partial"
# In it: what a merge has done.
JOURNAL = "monosoup_journal.jsonl"
# What the operating system says where there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def partial_of(out: Path) -> Path:
    """Return the folder in which a result is made before it takes its place."""
    return out.with_name(out.name + PARTIAL)


def occupied(out: Path, *, overwrite: bool) -> str | None:
    """Return the message for an output folder that holds something already, None where it may be written."""
    if not out.is_dir():
        return f"output {out} is a file; choose a folder" if out.exists() else None
    if overwrite:
        return None
    with told(out):
        # What a merge works in where it cannot work beside its result is not a result.
        held = any(entry.name != PARTIAL for entry in out.iterdir())
    if held:
        remedy = "choose another one, or pass --overwrite to replace its contents"
        return f"output folder {out} is not empty; {remedy}"
    return None


def left_behind(out: Path) -> str | None:
    """Return the message for what an interrupted merge has left where it works, None without."""
    result = Path(os.path.realpath(out))
    for root in (partial_of(result), result / PARTIAL):
        if not root.is_dir():
            continue
        with told(root):
            held = {entry.name for entry in root.iterdir()} - {"lock", "model"}
            begun = held or ((root / "model").is_dir() and any((root / "model").iterdir()))
        if begun:
            return (
                f"{root} is what an interrupted merge has left; pass --resume to go on with it, or "
                "--restart to delete it and begin again"
            )
    return None


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something, unless it may be replaced.

    Raises:
        ConfigurationError: see `occupied`.
    """
    message = occupied(out, overwrite=overwrite)
    if message is not None:
        raise ConfigurationError(message)


def too_small(out: Path, needed: float) -> str | None:
    """Return the message for a disk without room for the result, None where there is enough."""
    free = free_bytes(out)
    if needed <= free:
        return None
    return (
        f"the output needs {gigabytes(needed)} and the disk of {out} has {gigabytes(free)} free; choose "
        "another disk"
    )


def free_bytes(path: Path) -> int:
    """Return the free space of the disk on which a folder lies or will lie."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gigabytes(count: float) -> str:
    """Return a number of bytes in words."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


@contextmanager
def told(path: Path, needed: float | None = None) -> Iterator[None]:
    """Turn what the operating system says of a file that is written into a sentence with a remedy.

    Args:
        path: what is written.
        needed: bytes that are wanted of the disk, where that is known.

    Raises:
        OutputError: in place of `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise _error(path, error, needed) from error


def full_disk(folder: Path, why: str = "the result does not fit") -> OutputError:
    """Return the error for a disk without room."""
    return OutputError(
        f"the disk of {folder} is full: {why} and {gigabytes(free_bytes(folder))} are free; make room, or "
        "choose another disk"
    )


def _error(path: Path, error: OSError, needed: float | None) -> OutputError:
    if error.errno in FULL:
        return full_disk(path.parent, f"{path.name} needs {gigabytes(needed)}") if needed else full_disk(path)
    if error.errno in _FORBIDDEN:
        return OutputError(f"{path} cannot be written to ({error.strerror}); choose another output folder")
    if error.errno == errno.EFBIG:
        return OutputError(f"{path} is larger than its file system allows; pass a smaller --out-shard-size")
    return OutputError(f"{path} cannot be written to ({error.strerror or error})")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Not every file system can bring a folder to the disk, and none loses a name for it.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
