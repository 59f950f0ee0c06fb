"""The model whose files a merge takes, where it is asked for another than its first fine-tuned one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mergekit_monosoup.checkpoint.fitting import check_fits
from mergekit_monosoup.checkpoint.headers import read_folder
from mergekit_monosoup.errors import ConfigurationError, InputError
from mergekit_monosoup.planning.models import parse_reference, read_model
from mergekit_monosoup.planning.problems import Problems
from mergekit_monosoup.planning.recipe import Recipe


def check_files_from(
    wanted: str, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], problems: Problems
) -> None:
    """Note a source of files that is none, or is that of another model.

    Args:
        wanted: `base`, a model of the recipe, or another folder or Hub id.
        recipe: what to do.
        shapes: of the tensors of the result.
        problems: takes the findings.
    """
    if wanted == "base":
        if recipe.data.get("base_model") is None:
            problems.error("--files-from base: the recipe names no base_model; name a model")
        return
    try:
        folder = Path(wanted)
        if os.path.isdir(folder):
            try:
                stored = read_folder(wanted, folder, with_config=False).tensors
            except InputError:
                # It may hold tokenizer and configuration alone.
                stored = {}
        else:
            stored = read_model(parse_reference(wanted)).tensors
        check_fits(wanted, stored, shapes)
    except (ConfigurationError, InputError) as error:
        problems.error(f"--files-from: {error}")
