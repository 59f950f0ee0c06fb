"""The folder that a command will write to: whether it is taken, and what its disk has room for."""

from __future__ import annotations

import shutil
from pathlib import Path

# Beside the result while it is made, so that moving it into place never crosses a file system.
PARTIAL = ".partial"
# In it, as long as somebody works there.
LOCK = "monosoup.lock"


def partial_of(out: Path) -> Path:
    """Return the folder in which a result is made before it takes its place."""
    return out.with_name(out.name + PARTIAL)


def occupied(out: Path, *, overwrite: bool) -> str | None:
    """Return the message for an output folder that holds something already, None where it may be written."""
    if out.exists() and not out.is_dir():
        return f"output {out} is a file; choose a folder"
    if out.is_dir() and not overwrite and any(out.iterdir()):
        remedy = "choose another one, or pass --overwrite to replace its contents"
        return f"output folder {out} is not empty; {remedy}"
    return None


def left_behind(out: Path) -> str | None:
    """Return the message for what an interrupted merge has left beside an output folder, None without."""
    partial = partial_of(out.resolve() if out.is_symlink() else out.absolute())
    if not partial.is_dir() or all(entry.name == LOCK for entry in partial.iterdir()):
        return None
    return (
        f"{partial} is what an interrupted merge has left; pass --resume to go on with it, or --restart to "
        "begin again"
    )


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
