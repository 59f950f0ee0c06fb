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
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.dequantised import has_scales
from mergekit_monosoup.checkpoint.headers import read_folder
from mergekit_monosoup.checkpoint.lineage import SAMPLED_TENSORS, BaseWatch, check_base
from mergekit_monosoup.errors import ConfigurationError, InputError
from mergekit_monosoup.lora.exact import same_base
from mergekit_monosoup.merging.adapters import adapters_opened
from mergekit_monosoup.merging.architecture import fitting_architecture
from mergekit_monosoup.merging.card import write_card
from mergekit_monosoup.merging.local import run_units
from mergekit_monosoup.merging.progress import progress
from mergekit_monosoup.merging.report import merge_recorder
from mergekit_monosoup.merging.units import Unit, by_input, plan_units
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.planning.output import STAGING
from mergekit_monosoup.planning.plan import Plan, PlanOptions, make_plan
from mergekit_monosoup.registry import stock
from mergekit_monosoup.report.recorder import Recorder
from mergekit_monosoup.report.rounding import sample
from mergekit_monosoup.report.schema import TensorRecord

LOG = logging.getLogger(__name__)

# Folder for what peft has to merge; gone before the result is put in its place.
MERGED_ADAPTERS = "merged-adapters"


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
    with (
        _staged(out_path, overwrite) as staging,
        adapters_opened(config, options, staging / MERGED_ADAPTERS),
    ):
        host.open_models(config.referenced_models(), options)
        if ours and not force_base:
            check_bases(config)
        config = _with_common_dtype(config)
        total = sum(tensor.size for tensor in plan.tensors)
        with (
            progress(total, "Merging", quiet=options.quiet) as bar,
            merge_recorder(recipe, config, options, staging, bar, report and ours) as recorder,
        ):
            merge = Merge(config.base_model, finetuned_models(config), on_record=[recorder.add])
            _run(config, options, merge, staging, recorder)
            merge.close()
        _drop_quantization_config(staging / "config.json")
        if options.write_model_card:
            write_card(
                recipe,
                staging,
                out_path.resolve().name,
                recorder.header,
                recorder.records if ours else [],
                notes=[merge.decision.sentence()] if merge.decision is not None else [],
            )


def _run(
    config: MergeConfiguration, options: MergeOptions, merge: Merge, staging: Path, recorder: Recorder
) -> None:
    arch = fitting_architecture(config, options)
    out_config = host.out_config(config, arch, options.trust_remote_code)
    with stock().suspended():
        planned = plan_units(config, arch, options, out_config, merge)
    writer = TensorWriter(str(staging), options.out_shard_size, options.safe_serialization)
    recorded = {record.tensor for record in recorder.records}

    def write(unit: Unit, tensor: Tensor) -> None:
        writer.save_tensor(unit.name, tensor, clone=options.clone_tensors)
        if unit.name not in recorded and not any(r.tensor == unit.name for r in recorder.records):
            recorder.add(_passed_on(unit, config))

    run_units(planned, by_input(planned.units), options, write)
    writer.finalize()
    tokenizer = planned.tokenizer[1] if planned.tokenizer else None
    host.finish_folder(config, arch, options, out_config, tokenizer, str(staging))


def _passed_on(unit: Unit, config: MergeConfiguration) -> TensorRecord:
    """Return the record of a tensor that no method of ours was asked about."""
    action, reason = unit.passed_on or ("copied", "only the base has it")
    return TensorRecord(
        tensor=unit.name,
        shape=unit.shape,
        dtype=str(unit.dtype).removeprefix("torch."),
        action=action,
        reason=reason,
        method=config.merge_method,
    )


def finetuned_models(config: MergeConfiguration) -> tuple[ModelReference, ...]:
    """Return the models of a recipe besides its base, in the order in which they are listed."""
    owners = [config, *(config.modules or {}).values()]
    listed = [entry.model for owner in owners for entry in owner.models or ()]
    listed += [s.model for owner in owners for part in owner.slices or () for s in part.sources]
    return tuple(dict.fromkeys(model for model in listed if model != config.base_model))


def check_bases(config: MergeConfiguration) -> None:
    """Look at sampled values of all checkpoints of a recipe, which mergekit has opened by now.

    Raises:
        InputError: the base may not be the base.
    """
    base = config.base_model
    for model in finetuned_models(config) if base is not None else ():
        if model.lora is not None and same_base(model, base):
            continue
        message = _base_message(base, model)
        if message is not None:
            raise InputError(f"{message}, or pass --force-base to merge all the same")


def _base_message(base: ModelReference, model: ModelReference) -> str | None:
    """Sample the files; whole tensors only where they are pickled."""
    loaders = [LoaderCache().get(reference) for reference in (base, model)]
    if all(loader.index.is_safetensors for loader in loaders):
        folders = [Path(loader.index.base_path) for loader in loaders]
        one, two = (read_folder(str(r), f) for r, f in zip((base, model), folders, strict=True))
        return check_base(one, two)
    names = [name for name in loaders[0].index.tensor_paths if name in loaders[1].index.tensor_paths]
    watch = BaseWatch()
    for name in names[:: max(1, len(names) // (4 * SAMPLED_TENSORS))]:
        w0, w1 = (loader.get_tensor(name) for loader in loaders)
        if w0.ndim > 1 and w0.is_floating_point() and w0.shape == w1.shape:
            samples = [sample(tensor).double().numpy() for tensor in (w0, w1)]
            message = watch.see(str(base), str(model), name, *samples)
            if message is not None:
                return message
    return None


def _checked_plan(recipe: str, out_path: Path, options: MergeOptions, overwrite: bool) -> Plan:
    """Plan first: what can be known to fail must fail before a download."""
    plan = make_plan(
        recipe,
        PlanOptions(
            out=out_path,
            overwrite=overwrite,
            allow_crimes=options.allow_crimes,
            truncate_embeddings=options.unsafe_truncate_embeddings,
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
