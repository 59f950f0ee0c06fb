"""Versions of what takes part in a merge."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("mergekit-monosoup", "mergekit", "torch", "transformers", "safetensors", "peft")


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution, or `unknown` where it runs from a source tree."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions that a report states."""
    return {"python": platform.python_version()} | {name: installed_version(name) for name in _PACKAGES}
