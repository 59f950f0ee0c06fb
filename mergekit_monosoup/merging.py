"""Run a recipe through mergekit, leaving either a whole model or nothing."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_monosoup.card import write_card
from mergekit_monosoup.errors import ConfigurationError, InputError
from mergekit_monosoup.lineage import Relation, unrelated
from mergekit_monosoup.methods.reporting import checkpoint_folder, relation_of
from mergekit_monosoup.planning.headers import StoredTensor, read_folder
from mergekit_monosoup.planning.output import STAGING
from mergekit_monosoup.planning.plan import Plan, PlanOptions, make_plan
from mergekit_monosoup.planning.values import check_base
from mergekit_monosoup.progress import Progress, progress
from mergekit_monosoup.report.inputs import InputHashes
from mergekit_monosoup.report.reader import FILE_NAME
from mergekit_monosoup.report.recorder import Recorder, close_files, new_header, recording
from mergekit_monosoup.report.schema import TensorRecord

LOG = logging.getLogger(__name__)

_SAMPLED_TENSORS = 9


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
        _load(config, options)
        if ours and not force_base:
            _check_bases(config)
        # Where our methods report tensor by tensor, their bar takes the place of mergekit's, which counts
        # tasks; mergekit's own would also fill a log file with its redrawing.
        quiet = options.quiet or ours or not sys.stderr.isatty()
        # mergekit's card step asks the Hub about local paths of the form a/b; ours does not.
        run_options = options.model_copy(update={"write_model_card": False, "quiet": quiet})
        total = sum(tensor.size for tensor in plan.tensors)
        with progress(total, "Merging", quiet=options.quiet or not ours) as bar:
            recorder = _recorder(recipe, config, options, staging, bar if ours else None, report and ours)
            with recorder, recording(recorder):
                run_merge(config, str(staging), run_options)
                if ours:
                    _record_copied(recorder, staging, config)
        close_files()
        if options.write_model_card:
            name = out_path.resolve().name
            write_card(recipe, staging, name, recorder.header, recorder.records if ours else [])


def _recorder(
    recipe: str,
    config: MergeConfiguration,
    options: MergeOptions,
    staging: Path,
    bar: Progress | None,
    write: bool,
) -> Recorder:
    header = new_header(
        method=config.merge_method,
        configuration=recipe,
        seed=options.random_seed,
        device=options.device,
    )
    return Recorder(
        header,
        staging / FILE_NAME if write else None,
        hashes=_hashes(config) if write else None,
        listener=bar.record if bar is not None else None,
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


def _check_bases(config: MergeConfiguration) -> None:
    base = config.base_model
    if base is None:
        return
    for model in config.referenced_models():
        message = None if model == base else _base_message(base, model)
        if message is not None:
            raise InputError(f"{message}, or pass --force-base to merge all the same")


def _base_message(base: ModelReference, model: ModelReference) -> str | None:
    """Sample the files that mergekit has at hand by now; whole tensors only where they are pickled."""
    loaders = [LoaderCache().get(reference) for reference in (base, model)]
    if all(loader.index.is_safetensors for loader in loaders):
        folders = [Path(loader.index.base_path) for loader in loaders]
        one, two = (
            read_folder(str(reference), folder)
            for reference, folder in zip((base, model), folders, strict=True)
        )
        return check_base(one, two)
    names = [name for name in loaders[0].index.tensor_paths if name in loaders[1].index.tensor_paths]
    relations: list[Relation] = []
    step = max(1, len(names) // (4 * _SAMPLED_TENSORS))
    for name in names[step // 2 :: step]:
        w0, w1 = (loader.get_tensor(name) for loader in loaders)
        found = relation_of(name, w0, w1) if w0.ndim > 1 and w0.is_floating_point() else None
        if found is not None:
            relations.append(found)
        if len(relations) == _SAMPLED_TENSORS:
            break
    return unrelated(str(base), str(model), relations)


def _hashes(config: MergeConfiguration) -> InputHashes:
    base = config.base_model
    others = sorted((m for m in config.referenced_models() if m != base), key=str)
    models: list[tuple[str, Literal["base", "finetuned"], Path]] = []
    for model in [base, *others] if base is not None else others:
        folder = checkpoint_folder(model)
        if folder is not None:
            models.append((str(model), "base" if model == base else "finetuned", folder))
    return InputHashes(models)


def _record_copied(recorder: Recorder, staging: Path, config: MergeConfiguration) -> None:
    """Add the tensors that mergekit passed on by itself, without asking a merge method."""
    seen = {record.tensor for record in recorder.records}
    for name, tensor in _written(staging).items():
        if name in seen:
            continue
        reason = "only the base has it" if tensor.is_floating else "not floating-point"
        recorder.add(
            TensorRecord(
                tensor=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                action="copied",
                reason=reason,
                method=config.merge_method,
            )
        )


def _written(folder: Path) -> Mapping[str, StoredTensor]:
    return read_folder(str(folder), folder).tensors


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
