"""The tracks of the study by name, and what their results depend on."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

from benchmarks.robustness.track import Track

_HERE = Path(__file__).resolve().parent
_LIBRARIES = ("torch", "transformers", "peft", "numpy", "safetensors", "scikit-learn")


def _language(short: bool) -> Track:
    track: Track = importlib.import_module("benchmarks.robustness.language").LanguageTrack(short)
    return track


def _vision(name: str) -> Callable[[bool], Track]:
    def build(short: bool) -> Track:
        track: Track = importlib.import_module("benchmarks.robustness.vision").VisionTrack(name, short)
        return track

    return build


TRACKS: dict[str, Callable[[bool], Track]] = {
    "language": _language,
    "vit": _vision("vit"),
    "convnet": _vision("convnet"),
}
# The files that a track's training and scores come from.
SOURCES = {
    "language": ("language.py", "text.py", "sources.py"),
    "vit": ("vision.py", "digits.py"),
    "convnet": ("vision.py", "digits.py"),
}


@cache
def open_track(name: str, short: bool) -> Track:
    """Return a track; the same object for all jobs of a process, so that data is read once.

    Besides the names above, `module:class` opens a track of one's own.
    """
    if name in TRACKS:
        return TRACKS[name](short)
    module, _, kind = name.partition(":")
    track: Track = getattr(importlib.import_module(module), kind)(short)
    return track


def track_stamp(name: str, short: bool) -> str:
    """Return a digest of the track's code, data and settings, and of the libraries' versions."""
    track = open_track(name, short)
    sources = [_HERE / source for source in ("track.py", *SOURCES.get(name, ()))]
    if name not in TRACKS:
        sources.append(Path(inspect.getfile(type(track))))
    return _digest(*(file.read_bytes() for file in sources), _json(track.data_card()), _json(versions()))


@cache
def package_stamp() -> str:
    """Return a digest of this package's code and of mergekit's version, for everything that merges."""
    package = _HERE.parent.parent / "mergekit_monosoup"
    return _digest(
        *(file.read_bytes() for file in sorted(package.rglob("*.py"))), _json(_version("mergekit"))
    )


def code_stamp(*names: str) -> str:
    """Return a digest of files of the study."""
    return _digest(*((_HERE / name).read_bytes() for name in names))


def versions() -> dict[str, str]:
    """Return the versions of the libraries that training and scores depend on."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _json(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(b"%d " % len(part) + part)
    return total.hexdigest()[:24]
