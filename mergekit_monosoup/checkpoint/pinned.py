"""Models of a recipe at the commits that one process has found on the Hub, for others to read the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from mergekit.common import ModelPath, ModelReference
from pydantic import BaseModel, ConfigDict

from mergekit_monosoup.checkpoint.adapter_folder import CONFIG
from mergekit_monosoup.report.inputs import cached_revision

Value = TypeVar("Value")


class PinnedPath(ModelPath):
    """A model on the Hub at a commit, which records, errors and folders call as the recipe calls it."""

    model_config = ConfigDict(frozen=True)

    called: str

    def __str__(self) -> str:
        return self.called


def source_of(path: ModelPath) -> str:
    """Return the Hub id of a model with the revision that is read, or its folder."""
    return f"{path.path}@{path.revision}" if path.revision else path.path


def revisions_of(
    models: Iterable[ModelReference], folders: Mapping[ModelReference, Path], cache: str | None = None
) -> dict[str, str]:
    """Return the commits of what models and their adapters are read from, by their names.

    Args:
        models: opened already, so that the Hub's cache has what is read of each.
        folders: where the files of models lie; what is none of the Hub's snapshots says nothing.
        cache: folder of the Hub's cache, where it is not the usual one.
    """
    found: dict[str, str] = {}
    for model in models:
        folder = folders.get(model)
        commit = cached_revision(folder) if folder is not None else None
        for path, file in ((model.model, "config.json"), (model.lora, CONFIG)):
            if path is None or Path(path.path).exists():
                continue
            known = commit if path is model.model else None
            known = known or _cached(path, file, cache) or _cached(path, file, None)
            if known is not None:
                found.setdefault(str(path), known)
    return found


def _cached(path: ModelPath, file: str, cache: str | None) -> str | None:
    """Return the commit that the Hub's cache has a model's branch or tag at, None where it has none."""
    try:
        place = huggingface_hub.try_to_load_from_cache(path.path, file, cache, path.revision)
    except ValueError:
        # No name that the Hub could have.
        return None
    return cached_revision(Path(place).parent) if isinstance(place, str) else None


def pinned(value: Value, revisions: Mapping[str, str]) -> Value:
    """Return a recipe, or a part of one, with its models at these commits.

    All of its references become others: one that is pinned equals none that is not.
    """
    if isinstance(value, ModelPath):
        commit = revisions.get(str(value))
        same = commit is None or isinstance(value, PinnedPath)
        return value if same else PinnedPath(path=value.path, revision=commit, called=str(value))
    if isinstance(value, BaseModel):
        held = {name: getattr(value, name) for name in type(value).model_fields}
        return value.model_copy(update={name: pinned(part, revisions) for name, part in held.items()})
    if isinstance(value, dict):
        return {key: pinned(part, revisions) for key, part in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(pinned(part, revisions) for part in value)
    return value
