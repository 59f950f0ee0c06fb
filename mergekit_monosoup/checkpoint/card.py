"""The front matter of a model card: what its author says of the model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

# Front matter is a few lines; what follows may be long.
_LARGEST = 64_000
_ALIAS = re.compile(r"(?m)(^|[\s\[{,])[&*!][\w!]")


def front_matter(file: Path) -> dict[str, Any]:
    """Return the front matter of a README.md, empty where there is none that can be read."""
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        text = stream.read(_LARGEST).decode("utf-8", "replace").replace("\r\n", "\n")
    head, end, _ = text.removeprefix("---\n").partition("\n---")
    # Cards need no aliases or tags, and hostile ones need them.
    if not text.startswith("---\n") or not end or _ALIAS.search(head):
        return {}
    try:
        data = yaml.safe_load(head)
    except (
        yaml.YAMLError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        TypeError,
        RecursionError,
    ):
        return {}
    return data if isinstance(data, dict) else {}


def declared_bases(folder: Path) -> list[str]:
    """Return what the card of a folder names as the models that this one was made from."""
    declared = front_matter(folder / "README.md").get("base_model")
    listed = declared if isinstance(declared, list) else [declared]
    return [name for name in listed if isinstance(name, str) and name]


def public_name(model: str) -> str:
    """Return how a model is named where others read it: a Hub id as it is, a local folder without its path.

    Paths may name their owner.
    """
    parts = [
        part if _is_hub_id(part) else os.path.basename(os.path.abspath(part)) for part in model.split("+")
    ]
    return "+".join(parts)


def _is_hub_id(name: str) -> bool:
    return name[:1] not in ("/", ".", "~", "\\") and name.count("/") <= 1 and not os.path.exists(name)
