"""Run a recipe through mergekit, leaving either a whole model or nothing."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.dequantised import has_scales
from mergekit_monosoup.checkpoint.headers import read_folder
from mergekit_monosoup.checkpoint.lineage import SAMPLED_TENSORS, BaseWatch, check_base
from mergekit_monosoup.checkpoint.quantized import refuse_quantized_checkpoint
from mergekit_monosoup.errors import ConfigurationError, InputError, InterruptedMerge
from mergekit_monosoup.lora.cache import prepare_lora_cache
from mergekit_monosoup.merging import journal
from mergekit_monosoup.merging.architecture import fitting_architecture
from mergekit_monosoup.merging.card import write_card
from mergekit_monosoup.merging.fingerprint import check_unchanged, fingerprint, stamps
from mergekit_monosoup.merging.folder import WorkFolder
from mergekit_monosoup.merging.journal import Done, Journal
from mergekit_monosoup.merging.layout import plan_layout
from mergekit_monosoup.merging.local import run_units
from mergekit_monosoup.merging.progress import Progress
from mergekit_monosoup.merging.report import merge_recorder
from mergekit_monosoup.merging.units import Unit, by_input, plan_units
from mergekit_monosoup.merging.writer import PickleWriter, Writer
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.planning.plan import Plan, PlanOptions, make_plan
from mergekit_monosoup.registry import stock
from mergekit_monosoup.report.recorder import Recorder
from mergekit_monosoup.report.rounding import sample
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.report.table import remark

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How our command runs a recipe, beside mergekit's own options.

    Args:
        overwrite: replace what the output folder holds, once the new result stands.
        resume: go on with what an interrupted merge has left.
        restart: delete what an interrupted merge has left.
        force_base: merge although the values say that the base is none.
        report: write `monosoup_report.jsonl` where the method is one of ours.
    """

    overwrite: bool = False
    resume: bool = False
    restart: bool = False
    force_base: bool = False
    report: bool = True


def merge_to_folder(
    recipe: str, out_path: Path, options: MergeOptions, run_options: RunOptions = RunOptions()
) -> None:
    """Run `recipe` as `mergekit-yaml` would and put the finished model into `out_path`.

    It is made in `OUT.partial` beside it and moved in by one rename. What is done when the merge is
    interrupted is kept there, and `resume` goes on with it.

    Args:
        recipe: the YAML text.
        out_path: folder of the result; created where it is missing.
        options: mergekit's own options.
        run_options: ours.

    Raises:
        ConfigurationError: the plan finds errors (all of them are in the message), or the folder is taken.
        InputError: the base may not be the base.
        OutputError: the result cannot be written.
        InterruptedMerge: by the user; says how to go on.
    """
    plan = _checked_plan(recipe, out_path, options, run_options)
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
    folder = WorkFolder(out_path)
    left = folder.open(
        overwrite=run_options.overwrite, resume=run_options.resume, restart=run_options.restart
    )
    run = Run(recipe, config, options, plan, folder, left, run_options.report)
    try:
        run.prepare(run_options.force_base)
        run.execute()
        run.complete(out_path.resolve().name)
        folder.finish()
    except KeyboardInterrupt as error:
        folder.abandon(keep=run.has_results)
        if not run.has_results:
            raise InterruptedMerge("interrupted; nothing was written") from error
        raise InterruptedMerge(
            f"interrupted; what is done is kept in {folder.path}: run the same command with --resume to go on"
        ) from error
    except (ConfigurationError, InputError):
        # What was merged of such a recipe or input is of no use to the next.
        folder.abandon(keep=left)
        raise
    except BaseException:
        folder.abandon(keep=run.has_results)
        if run.has_results:
            LOG.warning("what is done is kept in %s; --resume goes on with it", folder.path)
        raise
    finally:
        run.close()


class Run:
    """One recipe on its way to a folder: plan, units, work, finish."""

    def __init__(
        self,
        recipe: str,
        config: MergeConfiguration,
        options: MergeOptions,
        plan: Plan,
        folder: WorkFolder,
        resumed: bool,
        report: bool,
    ) -> None:
        """Take what the run is about; nothing is read yet. See `merge_to_folder`."""
        self._recipe, self._config, self._options, self._plan = recipe, config, options, plan
        self._folder, self._resumed = folder, resumed
        self._ours = plan.method is not None and plan.method.ours
        self._report = report and self._ours
        # Records of tensors that are computed and not yet written.
        self._pending: dict[str, TensorRecord] = {}
        self._journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._bar: Progress | None = None
        self.has_results = resumed

    def prepare(self, force_base: bool) -> None:
        """Open the inputs, plan the units, and lay out the output's files."""
        config, options = self._config, self._options
        prepare_lora_cache(config, options)
        host.open_models(config.referenced_models(), options)
        for model in config.referenced_models() if self._ours else ():
            refuse_quantized_checkpoint(model)
        if self._ours and not force_base:
            check_bases(config)
        config = _with_common_dtype(config)
        self._models = config.referenced_models()
        self._inputs = stamps(self._models)
        self._merge = Merge(config.base_model, finetuned_models(config), on_record=[self._take])
        self._arch = fitting_architecture(config, options)
        self._out_config = host.out_config(config, self._arch, options.trust_remote_code)
        with stock().suspended():
            self._units = plan_units(config, self._arch, options, self._out_config, self._merge)
        self._config = config
        layout = plan_layout(
            ((u.name, u.shape, str(u.dtype).removeprefix("torch.")) for u in self._units.units),
            options.out_shard_size,
        )
        said = fingerprint(self._recipe, options, self._inputs, layout)
        file = self._folder.path / journal.NAME
        self._recorder = merge_recorder(self._recipe, config, options, self._folder.path, self._report)
        path = self._folder.path
        self._writer: Writer | PickleWriter
        if not options.safe_serialization:
            self._writer = PickleWriter(path, options.out_shard_size)
        elif self._resumed:
            self._writer = Writer.reopen(path, layout)
        else:
            self._writer = Writer.create(path, layout)
        self._journal = Journal.resume(file, said) if self._resumed else Journal(file, said)

    def execute(self) -> None:
        """Compute what is not there yet, and write it."""
        if self._journal is None or self._recorder is None:
            raise RuntimeError("a run is prepared before it is executed")
        total = sum(unit.size for unit in self._units.units)
        self._bar = Progress(total, "Merging", quiet=self._options.quiet)
        kept = self._verified()
        for unit in self._units.units:
            if unit.name in kept:
                self._tell(unit, kept[unit.name].record)
        rest = [unit for unit in self._units.units if unit.name not in kept]
        if kept:
            LOG.warning("going on: %d of %d tensors are done", len(kept), len(self._units.units))
        run_units(self._units, by_input(rest), self._options, self._store)
        if self._merge.decision is not None:
            self._journal.note(self._merge.decision.sentence())
        check_unchanged(self._inputs, self._models)
        self._writer.finish()
        self._merge.close()
        self._recorder.close()

    def complete(self, name: str) -> None:
        """Write what lies beside the weights: configuration, tokenizer, card."""
        if self._journal is None or self._recorder is None:
            raise RuntimeError("a run is executed before it is completed")
        path = self._folder.path
        tokenizer = self._units.tokenizer[1] if self._units.tokenizer else None
        host.finish_folder(self._config, self._arch, self._options, self._out_config, tokenizer, str(path))
        _drop_quantization_config(path / "config.json")
        records = self._recorder.records if self._ours else []
        note = remark(records)
        if note is not None:
            LOG.warning("%s", note)
        if self._options.write_model_card:
            write_card(self._recipe, path, name, self._recorder.header, records, notes=self._journal.notes)

    def close(self) -> None:
        """Let go of files."""
        if self._bar is not None:
            self._bar.close()
        if self._recorder is not None:
            self._recorder.abort()
        if self._journal is not None:
            self._journal.close()

    def _take(self, record: TensorRecord) -> None:
        self._pending[record.tensor] = record

    def _store(self, unit: Unit, tensor: Tensor) -> None:
        digest = self._writer.write(unit.name, tensor)
        record = self._pending.pop(unit.name, None) or _passed_on(unit, self._config)
        record = record.model_copy(update={"sha256": digest})
        line = record.model_dump(mode="json", exclude_defaults=True)
        if self._journal is not None:
            self._journal.add(Done(unit.name, digest, line))
        self.has_results = True
        self._tell(unit, line)

    def _tell(self, unit: Unit, line: dict[str, Any] | None) -> None:
        record = TensorRecord.model_validate(line) if line is not None else _passed_on(unit, self._config)
        if self._bar is not None:
            self._bar.record(record)
        if self._recorder is not None:
            self._recorder.add(record)

    def _verified(self) -> dict[str, Done]:
        """Return the finished tensors whose bytes are what the journal says."""
        if self._journal is None:
            return {}
        names = {unit.name for unit in self._units.units}
        found = {name: done for name, done in self._journal.kept.items() if name in names}
        return {name: done for name, done in found.items() if self._writer.stored_hash(name) == done.sha256}


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


def _checked_plan(recipe: str, out_path: Path, options: MergeOptions, run_options: RunOptions) -> Plan:
    """Plan first: what can be known to fail must fail before a download."""
    plan = make_plan(
        recipe,
        PlanOptions(
            out=out_path,
            overwrite=run_options.overwrite,
            allow_crimes=options.allow_crimes,
            truncate_embeddings=options.unsafe_truncate_embeddings,
            # The folder itself says what is left in it, once it is locked.
            resume=True,
            force_base=run_options.force_base,
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
