"""The model card of a merge, written without asking the network."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, metadata_load
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from yaml import YAMLError

from mergekit_monosoup.merging.public_recipe import PublicRecipe
from mergekit_monosoup.report.card import card_section
from mergekit_monosoup.report.schema import ReportHeader, TensorRecord

LOG = logging.getLogger(__name__)

FIGURES = "monosoup_figures"
_CARRIED = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")


def write_card(
    recipe: str,
    folder: Path,
    name: str,
    header: ReportHeader | None = None,
    records: Sequence[TensorRecord] = (),
    notes: Sequence[str] = (),
    sources: Sequence[Path] = (),
) -> None:
    """Write `README.md`, as mergekit does, into `folder`.

    The card calls local folders by their names: it goes to the public, and paths may name people.

    Args:
        recipe: the YAML text.
        folder: where the merged model lies.
        name: title of the card.
        header, records: report of the merge, for a section of its own; without records there is none.
        notes: paragraphs to add at its end.
        sources: folders of the checkpoint whose licence, languages and kind carry over, the first before all.
    """
    shown = PublicRecipe(recipe)
    config = MergeConfiguration.model_validate(shown.content)
    text = generate_card(config, shown.text, name)
    if header is not None and records:
        section = card_section(header, records, _figures(folder, records))
        before, marker, after = text.partition("### Configuration")
        text = f"{before}{section}\n{marker}{after}"
    card = ModelCard(shown.public("\n\n".join([text.rstrip(), *notes]) + "\n"))
    known: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    for key, value in (
        # Local folders are no repositories, and an empty list is not valid.
        ("base_model", known.get("base_model") or None),
        ("base_model_relation", "merge"),
        ("tags", [*known.get("tags", []), config.merge_method]),
    ):
        setattr(card.data, key, value)
    carried: dict[str, Any] = {}
    for source in sources:
        carried = _carried_over(source) | carried
    for key, value in carried.items():
        setattr(card.data, key, value)
    (folder / "README.md").write_text(str(card), "utf-8")


def _carried_over(source: Path) -> dict[str, Any]:
    """Return what the card of a checkpoint says of licence, languages and kind of model."""
    if not (source / "README.md").is_file():
        return {}
    try:
        known = metadata_load(source / "README.md") or {}
    except (ValueError, OSError, YAMLError):
        return {}
    # The result of an adapter is none.
    return {key: known[key] for key in _CARRIED if known.get(key) not in (None, "peft")}


def _figures(folder: Path, records: Sequence[TensorRecord]) -> list[Path]:
    """Draw all but spectra, which the page has; relative paths of the pictures, none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        LOG.info(
            "matplotlib is not installed, so the card has no figures; pip install mergekit-monosoup[plot]"
        )
        return []
    from mergekit_monosoup.report.plots import write_plots

    written = write_plots(records, folder / FIGURES, spectra=False)
    return [path.relative_to(folder) for path in written]
