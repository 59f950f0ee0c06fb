"""Run a recipe through mergekit, leaving either a whole model or nothing."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_monosoup.card import write_card
from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.methods.sfgs import recorded_decisions

LOG = logging.getLogger(__name__)

# Lies inside the output folder, so that moving files out of it never crosses a file system.
_STAGING = ".mergekit-monosoup-incomplete"


def merge_to_folder(recipe: str, out_path: Path, options: MergeOptions, *, overwrite: bool = False) -> None:
    """Run `recipe` as `mergekit-yaml` would and put the finished model into `out_path`.

    Args:
        recipe: the YAML text.
        out_path: folder of the result; created where it is missing.
        options: mergekit's own options.
        overwrite: replace what the folder holds, after the merge has succeeded.

    Raises:
        ConfigurationError: the recipe is no mapping, or the folder holds something already.
    """
    parsed = yaml.safe_load(recipe)
    if not isinstance(parsed, dict):
        raise ConfigurationError(
            "the recipe is not a mapping of keys such as merge_method: and models:; recipes with "
            "several documents are run by mergekit-multi"
        )
    config = MergeConfiguration.model_validate(parsed)
    with _staged(out_path, overwrite) as staging:
        # mergekit's card step asks the Hub about local paths of the form a/b; ours does not.
        with recorded_decisions() as decisions:
            run_merge(config, str(staging), options.model_copy(update={"write_model_card": False}))
        if options.write_model_card:
            notes = [decision.sentence() for decision in decisions]
            write_card(recipe, staging, name=out_path.resolve().name, notes=notes)


@contextmanager
def _staged(out_path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder whose files replace those of `out_path` on success, and vanish on failure."""
    existed = out_path.exists()
    staging = out_path / _STAGING
    if staging.exists():
        LOG.warning("removing what an interrupted merge left in %s", staging)
        shutil.rmtree(staging)
    if existed and any(out_path.iterdir()) and not overwrite:
        raise ConfigurationError(
            f"output folder {out_path} is not empty; choose another one, or pass --overwrite to "
            "replace its contents"
        )
    staging.mkdir(parents=True)
    try:
        yield staging
        for entry in list(out_path.iterdir()):
            if entry != staging:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        # config.json last: without it, no loader takes the folder for a model.
        for entry in sorted(staging.iterdir(), key=lambda e: e.name == "config.json"):
            os.replace(entry, out_path / entry.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and not any(out_path.iterdir()):
            out_path.rmdir()
