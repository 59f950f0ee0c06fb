"""The folder that a merge will write to."""

from __future__ import annotations

from pathlib import Path

from mergekit_monosoup.planning.problems import Problems

# Lies inside the output folder, so that moving files out of it never crosses a file system.
STAGING = ".mergekit-monosoup-incomplete"


def check_output(out: Path, needed: float, free: float, *, overwrite: bool, problems: Problems) -> None:
    """Note an output folder that holds something else, and a disk that is too small."""
    if out.exists() and not out.is_dir():
        problems.error(f"output {out} is a file; choose a folder")
    elif out.is_dir() and not overwrite and any(entry.name != STAGING for entry in out.iterdir()):
        problems.error(
            f"output folder {out} is not empty; choose another one, or pass --overwrite to replace "
            "its contents"
        )
    if needed > free:
        problems.error(
            f"the output needs {gigabytes(needed)} and the disk of {out} has {gigabytes(free)} free; "
            "choose another disk"
        )


def gigabytes(count: float) -> str:
    """Return a number of bytes in words."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
