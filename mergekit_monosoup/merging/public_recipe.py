"""Names for local folders, where what is written goes to the public: no path, no user's name."""

from __future__ import annotations

import os
import re
from pathlib import PurePath
from typing import Any

import yaml
from mergekit.common import ModelReference

# Beside the weights of a merged model: what it was made of.
RECIPE = "mergekit_config.yml"

# Keys of a recipe whose values name models.
_MODEL_KEYS = frozenset({"model", "base_model", "lora", "path", "source", "tokenizer_source"})
# What a tokenizer's source may be besides a model; a folder may be called so, too.
_SOURCE_KEYS = frozenset({"source", "tokenizer_source"})
_SOURCES = ("base", "union")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$")
# mergekit takes what begins so for local, and asks nobody about it.
_MARK = "~monosoup~/"


class PublicRecipe:
    """A recipe as it may be shown: each local folder by a name, all else as it was written."""

    def __init__(self, recipe: str) -> None:
        """Read the YAML text of a recipe."""
        self._names: dict[str, str] = {}
        content = yaml.safe_load(recipe)
        marked = self._replaced(content)
        #: for `mergekit.card`, whose text `public` is to go through
        self.content: dict[str, Any] = marked
        # Comments may hold paths as well; where there are none, the text stays as it was written.
        self.text = yaml.safe_dump(marked, sort_keys=False, allow_unicode=True) if self._names else recipe

    def public(self, text: str) -> str:
        """Return a text with names in the place of the recipe's local paths."""
        for path in sorted(self._names, key=len, reverse=True):
            # A bare name gives nothing away, and may be a word of any sentence.
            if "/" in path.strip("./") or "\\" in path:
                text = text.replace(path, self._names[path])
        return text.replace(_MARK, "")

    def _replaced(self, value: Any, key: str | None = None) -> Any:
        if isinstance(value, dict):
            return {k: self._replaced(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [self._replaced(v, key) for v in value]
        if not isinstance(value, str):
            return value
        if key in _MODEL_KEYS:
            kept = key in _SOURCE_KEYS and value in _SOURCES
            return value if kept else self._reference(value)
        return self._name(value) if _is_absolute(value) else value

    def _reference(self, value: str) -> str:
        if os.path.isdir(value):
            return self._name(value)
        reference = ModelReference.parse(value)
        parts = (reference.model, reference.lora)
        return "+".join(self._name(str(p)) if _is_local(p.path) else str(p) for p in parts if p is not None)

    def _name(self, path: str) -> str:
        if path not in self._names:
            snapshot = _SNAPSHOT.search(path)
            if snapshot is not None:
                self._names[path] = f"{snapshot[1]}/{snapshot[2]}"
                return self._names[path]
            plain = PurePath(path.replace("\\", "/")).name or "model"
            plain = os.path.basename(os.path.abspath(path)) if plain in (".", "..") else plain
            name, count = plain, 1
            while name in self._names.values():
                count += 1
                name = f"{plain}-{count}"
            self._names[path] = name
        name = self._names[path]
        return name if _SNAPSHOT.search(path) else _MARK + name


def _is_absolute(value: str) -> bool:
    return "\n" not in value and re.match(r"(/|~/|\./|\.\./|[A-Za-z]:[\\/])", value) is not None


def _is_local(path: str) -> bool:
    return path[:1] in tuple("/~.\\") or path.count("/") > 1 or os.path.exists(path)
