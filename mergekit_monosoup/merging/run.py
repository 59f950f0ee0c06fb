"""Run a recipe through mergekit, leaving either a whole model or nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoint.base_check import check_bases
from mergekit_monosoup.checkpoint.dequantised import has_scales
from mergekit_monosoup.checkpoint.quantized import config_written_here
from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.lora.cache import prepare_lora_cache
from mergekit_monosoup.merging.architecture import fitting_architecture
from mergekit_monosoup.merging.card import write_card
from mergekit_monosoup.merging.progress import progress
from mergekit_monosoup.merging.report import merge_recorder, record_copied
from mergekit_monosoup.methods.sfgs import recorded_decisions
from mergekit_monosoup.planning.output import STAGING
from mergekit_monosoup.planning.plan import Plan, PlanOptions, make_plan
from mergekit_monosoup.report.recorder import close_files, recording

LOG = logging.getLogger(__name__)


def merge_to_folder(
    recipe: str,
    out_path: Path,
    options: MergeOptions,
    *,
    overwrite: bool = False,
    force_base: bool = False,
    report: bool = True,
) -> None:
    """Run `recipe` as `mergekit-yaml` would and put the finished model into `out_path`.

    Args:
        recipe: the YAML text.
        out_path: folder of the result; created where it is missing.
        options: mergekit's own options.
        overwrite: replace what the folder holds, after the merge has succeeded.
        force_base: merge although the values say that the base is none.
        report: write `monosoup_report.jsonl` where the method is one of ours.

    Raises:
        ConfigurationError: the plan finds errors; all of them are in the message.
        InputError: the base may not be the base.
    """
    plan = _checked_plan(recipe, out_path, options, overwrite)
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
    ours = plan.method is not None and plan.method.ours
    with _staged(out_path, overwrite) as staging:
        prepare_lora_cache(config, options)
        _load(config, options)
        if ours and not force_base:
            check_bases(config)
        # Where our methods report tensor by tensor, their bar takes the place of mergekit's, which counts
        # tasks; mergekit's own would also fill a log file with its redrawing.
        quiet = options.quiet or ours or not sys.stderr.isatty()
        # mergekit's card step asks the Hub about local paths of the form a/b; ours does not.
        run_options = options.model_copy(update={"write_model_card": False, "quiet": quiet})
        total = sum(tensor.size for tensor in plan.tensors)
        with (
            progress(total, "Merging", quiet=options.quiet or not ours) as bar,
            merge_recorder(
                recipe, config, options, staging, bar if ours else None, report and ours
            ) as recorder,
            recording(recorder),
        ):
            with (
                fitting_architecture(config, options),
                config_written_here(),
                recorded_decisions() as decisions,
            ):
                run_merge(_with_common_dtype(config), str(staging), run_options)
            _drop_quantization_config(staging / "config.json")
            if ours:
                record_copied(recorder, staging, config)
        close_files()
        if options.write_model_card:
            write_card(
                recipe,
                staging,
                out_path.resolve().name,
                recorder.header,
                recorder.records if ours else [],
                notes=[decision.sentence() for decision in decisions],
            )


def _checked_plan(recipe: str, out_path: Path, options: MergeOptions, overwrite: bool) -> Plan:
    """Plan first: what can be known to fail must fail before a download."""
    plan = make_plan(
        recipe,
        PlanOptions(
            out=out_path,
            overwrite=overwrite,
            allow_crimes=options.allow_crimes,
            truncate_embeddings=options.unsafe_truncate_embeddings,
            lora_cache=options.lora_merge_cache is not None,
            costs=False,
        ),
    )
    for problem in plan.problems.warnings:
        LOG.warning("%s", problem)
    errors = plan.problems.errors
    if len(errors) == 1:
        raise ConfigurationError(str(errors[0]))
    if errors:
        raise ConfigurationError("the merge would fail:\n  " + "\n  ".join(map(str, errors)))
    return plan


def _load(config: MergeConfiguration, options: MergeOptions) -> None:
    """Have mergekit download what is missing, so that the values can be looked at before the work."""
    cache = LoaderCache()
    cache.setup(options=options)
    for model in config.referenced_models():
        cache.get(model)


def _with_common_dtype(config: MergeConfiguration) -> MergeConfiguration:
    """Set `dtype` where some checkpoints are float8 and others are not: these have no common dtype."""
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
    staging = out_path / STAGING
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
