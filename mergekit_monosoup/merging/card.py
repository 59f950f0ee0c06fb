"""The model card of a merge, written without asking the network."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, metadata_load
from mergekit.card import generate_card
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from yaml import YAMLError

from mergekit_monosoup.report.card import card_section
from mergekit_monosoup.report.schema import ReportHeader, TensorRecord

LOG = logging.getLogger(__name__)

FIGURES = "monosoup_figures"
_CARRIED = ("license", "license_name", "license_link", "language")
_MODEL_KEYS = frozenset({"model", "base_model", "lora", "path"})


def write_card(
    recipe: str,
    folder: Path,
    name: str,
    header: ReportHeader | None = None,
    records: Sequence[TensorRecord] = (),
    notes: Sequence[str] = (),
    source: Path | None = None,
) -> None:
    """Write `README.md` and `mergekit_config.yml`, as mergekit does, into `folder`.

    Args:
        recipe: the YAML text, stored as it is.
        folder: where the merged model lies.
        name: title of the card.
        header, records: report of the merge, for a section of its own; without records there is none.
        notes: paragraphs to add at its end.
        source: folder of the checkpoint whose licence and languages carry over.
    """
    config = MergeConfiguration.model_validate(_with_explicit_paths(yaml.safe_load(recipe)))
    text = generate_card(config, recipe, name)
    if header is not None and records:
        section = card_section(header, records, _figures(folder, records))
        before, marker, after = text.partition("### Configuration")
        text = f"{before}{section}\n{marker}{after}"
    card = ModelCard("\n\n".join([text.rstrip(), *notes]) + "\n")
    known: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    for key, value in (
        # Local folders are no repositories, and an empty list is not valid.
        ("base_model", known.get("base_model") or None),
        ("base_model_relation", "merge"),
        ("tags", [*known.get("tags", []), config.merge_method]),
    ):
        setattr(card.data, key, value)
    for key, value in _carried_over(source).items():
        setattr(card.data, key, value)
    (folder / "README.md").write_text(str(card), "utf-8")
    (folder / "mergekit_config.yml").write_text(recipe, "utf-8")


def _carried_over(source: Path | None) -> dict[str, Any]:
    """Return licence and languages that the card of the source names."""
    if source is None or not (source / "README.md").is_file():
        return {}
    try:
        known = metadata_load(source / "README.md") or {}
    except (ValueError, OSError, YAMLError):
        return {}
    return {key: known[key] for key in _CARRIED if key in known}


def _figures(folder: Path, records: Sequence[TensorRecord]) -> list[Path]:
    """Draw what can be drawn; relative paths of the pictures, none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        LOG.info(
            "matplotlib is not installed, so the card has no figures; pip install mergekit-monosoup[plot]"
        )
        return []
    from mergekit_monosoup.report.plots import write_plots

    written = write_plots(records, folder / FIGURES)
    return [path.relative_to(folder) for path in written]


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
