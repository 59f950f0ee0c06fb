"""Bring the files of a fine-tuned checkpoint to a model that stock mergekit merged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoint.companions import companions, is_tokenizer
from mergekit_monosoup.checkpoint.fitting import check_fits
from mergekit_monosoup.checkpoint.headers import read_config, read_folder
from mergekit_monosoup.checkpoint.hub import read_hub
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.merging.files import (
    bring_files,
    layer_sources,
    put_config_right,
    reference_to,
    source_of,
    tensors_in,
)
from mergekit_monosoup.merging.layer_settings import layers_key
from mergekit_monosoup.merging.modules import copy_modules
from mergekit_monosoup.merging.public_recipe import RECIPE
from mergekit_monosoup.merging.tokenizers import chat_template_in, has_vocabulary, set_chat_template

LOG = logging.getLogger(__name__)


def complete(folder: str | Path, source: str | Path) -> list[str]:
    """Give a model that stock mergekit merged the files of its fine-tuned checkpoint.

    mergekit copies them from the base. Configuration (put right where the written weights differ), generation
    settings, tokenizer and chat templates, processors, code (never run) and modules take their place;
    `checkpoint.companions` lists what is left behind. What the model's recipe (mergekit_config.yml) says of
    tokenizer and chat template stays.

    Args:
        folder: the merged model; its weights stay as they are.
        source: the fine-tuned checkpoint, a folder or Hub id (`base+adapter` too).

    Returns:
        The names of the files that were brought.

    Raises:
        InputError: one of the two is not a model, or the weights are not of the same model.
    """
    out, options = Path(folder), MergeOptions()
    written = read_folder(str(folder), out, with_config=False).tensors
    reference = reference_to(str(source))
    found = source_of(reference, options)
    if found.folder.resolve() == out.resolve():
        raise InputError(f"{folder} is the merged model itself; name the fine-tuned model of the merge")
    before = tensors_in(found.folder)
    if not before and not Path(reference.model.path).is_dir():
        before = read_hub(reference.model.path, reference.model.path, reference.model.revision).tensors
    check_fits(found.model, before, {name: tensor.shape for name, tensor in written.items()})
    recipe = _recipe_of(out)
    own_tokenizer = bool(recipe.get("tokenizer") or recipe.get("tokenizer_source"))
    template = chat_template_in(out) if recipe.get("chat_template") else None
    brought = bring_files(found, out, own_tokenizer=own_tokenizer)
    if any(map(has_vocabulary, brought)):
        _remove_others(out, brought, found.model)
    put_config_right(found.folder, out, layers=_layers(recipe, found.folder), before=before)
    if template is not None:
        set_chat_template(out, template)
    return sorted({*brought, *copy_modules(found.folder, out), "config.json"})


def _remove_others(out: Path, brought: Sequence[str], model: str) -> None:
    """Remove what the base's tokenizer has beyond the fine-tuned one: the two would be read as one."""
    for name in companions(out).taken:
        if is_tokenizer(name) and name not in brought:
            LOG.warning("removing %s, which %s does not have", out / name, model)
            (out / name).unlink()


def _layers(recipe: Mapping[str, Any], source: Path) -> Mapping[str, Sequence[int]]:
    modules = [""] if recipe.get("slices") else list(recipe.get("modules") or {})
    if not modules:
        return {}
    config = read_config(source)
    keys = {module: layers_key(config, module) for module in modules}
    return layer_sources(MergeConfiguration.model_validate(recipe), keys)


def _recipe_of(out: Path) -> dict[str, Any]:
    """Return the recipe that mergekit leaves beside a merged model; empty where there is none."""
    file = out / RECIPE
    try:
        content = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
