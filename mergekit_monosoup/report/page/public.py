"""Names and texts without local paths: what a page says may be read by anybody."""

from __future__ import annotations

import re
from pathlib import PurePath

_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?")
# A path of at least two parts that begins at a root, a home, a drive or here.
_PATH = re.compile(
    r"""(?<![\w.~/\\:-])
    (?: [A-Za-z]:[\\/] | \\\\ | ~[\w-]*[\\/] | \.{1,2}[\\/] | / )
    [^\s'"`<>|,;()\[\]{}]* [^\s'"`<>|,;:.()\[\]{}]""",
    re.VERBOSE,
)


def public_name(model: str) -> str:
    """Return how a model may be called in public: an id of the Hub as it is, a local folder by its name.

    Args:
        model: as a recipe names it: folder, Hub id, or base+adapter.
    """
    return "+".join(_part(part) for part in model.split("+"))


def without_paths(text: str) -> str:
    """Return a text in which each local path is its last part."""
    return _PATH.sub(lambda match: _last(match[0]), text)


def _part(name: str) -> str:
    snapshot = _SNAPSHOT.search(name)
    local = name[:1] in tuple("/~.\\") or "\\" in name or name.count("/") > 1
    return f"{snapshot[1]}/{snapshot[2]}" if snapshot else _last(name) if local else name


def _last(path: str) -> str:
    snapshot = _SNAPSHOT.search(path)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}"
    return PurePath(path.replace("\\", "/")).name.strip(".~") or "model"
