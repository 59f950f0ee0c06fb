"""The model card of a merge, written without asking the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit.card import generate_card
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration

_MODEL_KEYS = frozenset({"model", "base_model", "lora", "path"})


def write_card(recipe: str, folder: Path, name: str, notes: Sequence[str] = ()) -> None:
    """Write `README.md` and `mergekit_config.yml`, as mergekit does, into `folder`.

    Args:
        recipe: the YAML text, stored as it is.
        folder: where the merged model lies.
        name: title of the card.
        notes: paragraphs to add at its end.
    """
    config = MergeConfiguration.model_validate(_with_explicit_paths(yaml.safe_load(recipe)))
    card = "\n\n".join([generate_card(config, recipe, name).rstrip(), *notes])
    (folder / "README.md").write_text(card + "\n", "utf-8")
    (folder / "mergekit_config.yml").write_text(recipe, "utf-8")


def _with_explicit_paths(value: Any, key: str | None = None) -> Any:
    """Spell local models `./a/b`: mergekit would look up a plain `a/b` on the Hub."""
    if isinstance(value, dict):
        return {k: _with_explicit_paths(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_explicit_paths(v, key) for v in value]
    if isinstance(value, str) and key in _MODEL_KEYS:
        ref = ModelReference.parse(value)
        return str(
            ref.model_copy(update={"model": _explicit(ref.model), "lora": ref.lora and _explicit(ref.lora)})
        )
    return value


def _explicit(path: ModelPath) -> ModelPath:
    if path.path[0] in "/~." or not os.path.exists(path.path):
        return path
    return path.model_copy(update={"path": f"./{path.path}"})
