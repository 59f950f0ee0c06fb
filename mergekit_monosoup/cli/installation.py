"""Facts about this Python installation: versions, site directories, start-up files, scripts."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import sysconfig
from collections.abc import Sequence
from pathlib import Path

OURS = "mergekit-monosoup"
STARTUP_FILES = ("mergekit_monosoup.pth", "mergekit_monosoup.start")
# The same range as in pyproject.toml; written out because the metadata may be what is missing.
MERGEKIT_REQUIREMENT = "mergekit>=0.1.5,<0.2"
_MERGEKIT_LOWEST, _MERGEKIT_EXCLUDED = (0, 1, 5), (0, 2)


def installed_version(distribution: str) -> str | None:
    """Return the version that is installed, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def supported(version: str) -> bool:
    """Return whether a version of mergekit lies in the range that this package is made for."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    release = tuple(int(part) for part in match.group().split(".")) if match else ()
    return _MERGEKIT_LOWEST <= release < _MERGEKIT_EXCLUDED


def site_directories() -> list[str]:
    """Return the directories whose start-up files this Python runs."""
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [*site.getsitepackages(), *user]


def with_startup_file(directories: Sequence[str]) -> list[str]:
    """Return those of the directories that hold a start-up file of ours, each once."""
    real = dict.fromkeys(os.path.realpath(d) for d in directories if d)
    return [d for d in real if any(os.path.lexists(os.path.join(d, name)) for name in STARTUP_FILES)]


def own_mergekit_yaml() -> Path | None:
    """Return the `mergekit-yaml` that belongs to this Python, on PATH or not."""
    folder = Path(sysconfig.get_path("scripts"))
    return next((folder / n for n in ("mergekit-yaml", "mergekit-yaml.exe") if (folder / n).exists()), None)


def interpreter_of(script: str) -> str | None:
    """Return the interpreter that a console script names, or None where it names no Python."""
    try:
        with open(script, "rb") as file:
            head = file.read(4096).decode("utf-8", "replace")
    except OSError:
        return None
    # The first form is what pip writes where the path is long or holds a space.
    match = re.match(r"#!/bin/sh\n'''exec' \"?([^\"\n]+?)\"? \"\$0\"", head) or re.match(
        r"#!\s*(?:/usr/bin/env\s+)?([^\n]*?)\s*\n", head
    )
    named = match.group(1) if match else ""
    if not Path(named).name.lower().startswith(("python", "pypy")):
        return None
    return named if os.path.isabs(named) else shutil.which(named)


def installation_of(executable: str) -> str:
    """Return what tells one Python installation or virtual environment from another."""
    folder = Path(executable).parent
    for prefix in (folder, folder.parent):
        if (prefix / "pyvenv.cfg").exists():
            return os.path.realpath(prefix)
    return os.path.realpath(executable)
