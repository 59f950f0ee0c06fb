"""Run a recipe through mergekit, leaving either a whole model or nothing."""

from __future__ import annotations

import json
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

from mergekit_monosoup.architecture import fitting_architecture
from mergekit_monosoup.card import write_card
from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.lora.cache import prepare_lora_cache
from mergekit_monosoup.methods.dequantised import has_scales
from mergekit_monosoup.methods.quantized import config_written_here
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
        prepare_lora_cache(config, options)
        # mergekit's card step asks the Hub about local paths of the form a/b; ours does not.
        with fitting_architecture(config, options), config_written_here(), recorded_decisions() as decisions:
            run_merge(
                _with_common_dtype(config),
                str(staging),
                options.model_copy(update={"write_model_card": False}),
            )
        _drop_quantization_config(staging / "config.json")
        if options.write_model_card:
            notes = [decision.sentence() for decision in decisions]
            write_card(recipe, staging, name=out_path.resolve().name, notes=notes)


def _with_common_dtype(config: MergeConfiguration) -> MergeConfiguration:
    """Set `dtype` where some checkpoints are float8 and others are not: these have no common dtype."""
    from mergekit.io.tasks import LoaderCache

    held = [LoaderCache().get(model).index.tensor_paths for model in config.referenced_models()]
    float8 = {has_scales(names) for names in held}
    if config.dtype is not None or len(float8) == 1:
        return config
    LOG.warning("some checkpoints are stored as float8 and others are not: merging with dtype: bfloat16")
    return config.model_copy(update={"dtype": "bfloat16"})


def _drop_quantization_config(file: Path) -> None:
    """Remove what config.json says of a quantised base: merged weights are stored as plain numbers."""
    content = json.loads(file.read_text("utf-8"))
    if content.pop("quantization_config", None) is not None:
        LOG.warning("the merged weights are not quantised: config.json is without quantization_config")
        file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


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
