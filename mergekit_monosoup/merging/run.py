"""Run a recipe through mergekit, leaving either a whole model or nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.alignment.soup_decision import SoupDecision
from mergekit_monosoup.checkpoint.fitting import check_fits
from mergekit_monosoup.checkpoint.output import FULL, full_disk
from mergekit_monosoup.checkpoint.quantized import refuse_quantized_checkpoint
from mergekit_monosoup.checkpoint.work_folder import WorkFolder
from mergekit_monosoup.errors import ConfigurationError, InputError, InterruptedMerge
from mergekit_monosoup.merging.adapters import MERGED_ADAPTERS, adapters_opened, stored_model
from mergekit_monosoup.merging.card import write_card
from mergekit_monosoup.merging.files import files_model, source_of, tensors_in, write_beside
from mergekit_monosoup.merging.fingerprint import check_unchanged, fingerprint, stamps
from mergekit_monosoup.merging.journal import Done, Journal
from mergekit_monosoup.merging.local import run_units
from mergekit_monosoup.merging.modules import merge_modules
from mergekit_monosoup.merging.opened import model_types, open_with_common_names
from mergekit_monosoup.merging.prepared import Prepared, check_bases
from mergekit_monosoup.merging.progress import Progress
from mergekit_monosoup.merging.public_recipe import RECIPE, PublicRecipe
from mergekit_monosoup.merging.report import merge_recorder
from mergekit_monosoup.merging.units import Unit, by_input, is_out_of_memory, out_of_memory
from mergekit_monosoup.merging.writer import PickleWriter, Writer
from mergekit_monosoup.planning.plan import Plan, PlanOptions, make_plan
from mergekit_monosoup.report.page.content import merge_page
from mergekit_monosoup.report.page.render import PAGE_NAME, write_page
from mergekit_monosoup.report.recorder import Recorder
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.report.table import remark
from mergekit_monosoup.spectral.parts import PartsStore

if TYPE_CHECKING:
    from mergekit_monosoup.cluster.connection import RayOptions

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How our command runs a recipe, beside mergekit's own options.

    Args:
        overwrite: replace what the output folder holds, once the new result stands.
        resume: go on with what an interrupted merge has left.
        restart: delete what an interrupted merge has left.
        force_base: merge although the values say that the base is none.
        report: write `monosoup_report.jsonl` and the page of it where the method is one of ours.
        ray: where to run the units; absent: in this process.
        files_from: model whose files go beside the weights: `base`, or a folder or Hub id; absent: the first
            fine-tuned one of the recipe.
        parts: keeps the parts of updates for further merges of the same models; then nothing is measured.
    """

    overwrite: bool = False
    resume: bool = False
    restart: bool = False
    force_base: bool = False
    report: bool = True
    ray: RayOptions | None = None
    files_from: str | None = None
    parts: PartsStore | None = None


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
    run = Run(recipe, config, options, plan, folder, left, run_options)
    try:
        try:
            run.prepare(run_options.force_base)
            run.execute()
            run.complete(out_path.resolve().name)
        finally:
            # Under the lock still: what the journal has not written yet goes to the disk.
            run.close()
        folder.finish()
    except KeyboardInterrupt as error:
        folder.abandon(keep=run.has_results)
        if not run.has_results:
            raise InterruptedMerge("interrupted; nothing was written") from error
        raise InterruptedMerge(
            f"interrupted; what is done is kept in {folder.root}: run the same command with --resume to go on"
        ) from error
    except (ConfigurationError, InputError):
        # What was merged of such a recipe or input is of no use to the next.
        folder.abandon(keep=left)
        raise
    except BaseException as error:
        folder.abandon(keep=run.has_results)
        if run.has_results:
            LOG.warning("what is done is kept in %s; --resume goes on with it", folder.root)
        if is_out_of_memory(error):
            raise out_of_memory("the merge") from error
        if isinstance(error, OSError) and error.errno in FULL:
            raise full_disk(folder.path) from error
        raise


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
        run_options: RunOptions,
    ) -> None:
        """Take what the run is about; nothing is read yet. See `merge_to_folder`."""
        self._recipe, self._config, self._options, self._plan = recipe, config, options, plan
        self._folder, self._resumed = folder, resumed
        self._shown = PublicRecipe(recipe)
        self._ours = plan.method is not None and plan.method.ours
        self._report = run_options.report and self._ours
        self._ray = run_options.ray
        self._files_from = run_options.files_from
        self._parts = run_options.parts
        # Records of tensors that are computed and not yet written.
        self._pending: dict[str, TensorRecord] = {}
        self._journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._bar: Progress | None = None
        self._opened = ExitStack()
        self.has_results = resumed

    def prepare(self, force_base: bool) -> None:
        """Open the inputs, plan the units, and lay out the output's files."""
        config, options = self._config, self._options
        # First: a name that is wrong must not show when all is computed.
        self._source = source_of(files_model(config, self._files_from), options, config.base_model)
        copies = self._folder.root / MERGED_ADAPTERS
        self._opened.enter_context(adapters_opened(config, options, copies))
        host.open_models(config.referenced_models(), options)
        types = model_types(config.referenced_models(), options)
        self._opened.enter_context(host.plain_configurations(types))
        for model in config.referenced_models() if self._ours else ():
            refuse_quantized_checkpoint(stored_model(model))
        if self._ours and not force_base:
            check_bases(config, open_with_common_names(config, as_stored=options.allow_crimes))
        # To measure a tensor takes as long as to put its parts together.
        listeners = [self._take] if self._parts is None else []
        self._prepared = Prepared.of(config, options, listeners, self._parts)
        if self._files_from is not None:
            shapes = {unit.name: unit.shape for unit in self._prepared.units.units}
            check_fits(self._source.model, tensors_in(self._source.folder), shapes)
        self._inputs = stamps(self._prepared.models)
        layout, path = self._prepared.layout, self._folder.path
        said = fingerprint(self._recipe, options, self._inputs, layout)
        self._recorder = merge_recorder(self._shown, config, options, path, self._report)
        kept = Journal.resume(self._folder.journal, said, self._sync) if self._resumed else None
        self._writer: Writer | PickleWriter
        if not options.safe_serialization:
            self._writer = PickleWriter(path, options.out_shard_size)
        elif self._resumed:
            self._writer = Writer.reopen(path, layout)
        else:
            self._writer = Writer.create(path, layout)
        self._journal = kept or Journal(self._folder.journal, said, self._sync)

    def execute(self) -> None:
        """Compute what is not there yet, and write it."""
        if self._journal is None or self._recorder is None:
            raise RuntimeError("a run is prepared before it is executed")
        units = self._prepared.units.units
        self._bar = Progress(sum(unit.size for unit in units), "Merging", quiet=self._options.quiet)
        kept = self._verified()
        for unit in units:
            if unit.name in kept:
                self._tell(unit, kept[unit.name].record)
        rest = [unit for unit in units if unit.name not in kept]
        if kept:
            LOG.warning("going on: %d of %d tensors are done", len(kept), len(units))
        if self._ray is not None and rest:
            self._on_ray(rest, self._ray)
        else:
            run_units(self._prepared.units, by_input(rest), self._options, self._store)
        if self._prepared.merge.decision is not None:
            self._journal.note(self._prepared.merge.decision.sentence())
        check_unchanged(self._inputs, self._prepared.models)
        self._writer.finish()
        self._prepared.merge.close()

    def _on_ray(self, units: Sequence[Unit], ray_options: RayOptions) -> None:
        from mergekit_monosoup.cluster.connection import connected
        from mergekit_monosoup.merging.on_ray import Cluster

        if not self._options.safe_serialization:
            raise ConfigurationError("--ray writes safetensors files; leave out --no-safe-serialization")
        with connected(ray_options):
            cluster = Cluster(self._prepared, self._options, self._folder.path, ray_options)
            try:
                merge = self._prepared.merge
                if self._config.merge_method == "sfgs":
                    # One decision, taken here over inner products from all workers, and handed to all.
                    merge.align = cluster.align
                    first, *units = sorted(units, key=lambda unit: unit.size)
                    run_units(self._prepared.units, [first], self._options, self._store)
                cluster.run(units, self._written, self._came_back)
            finally:
                cluster.close()

    def complete(self, name: str) -> None:
        """Write what lies beside the weights: recipe, configuration, tokenizer, card."""
        if self._journal is None or self._recorder is None:
            raise RuntimeError("a run is executed before it is completed")
        path, ready, options = self._folder.path, self._prepared, self._options
        tokenizer = ready.units.tokenizer[1] if ready.units.tokenizer else None
        # Without a card too: by it the result is verified, and a chosen soup made again.
        (path / RECIPE).write_text(self._recipe, "utf-8")
        # A text-only fine-tune of a larger base: the result has all of the base.
        whole = self._files_from is None and ready.described_by == ready.config.base_model
        described = Path(host.folder_of(ready.described_by)) if whole else None
        write_beside(path, self._source, ready.config, ready.arch, options, tokenizer, described)
        decision = ready.merge.decision
        taken = list(decision.taken) if isinstance(decision, SoupDecision) else None
        modules = merge_modules(
            ready.config, options, self._source.folder, path, ours=self._ours, taken=taken
        )
        for record in modules:
            self._recorder.add(record)
        self._recorder.close()
        records = self._recorder.records if self._ours else []
        note = remark(records)
        if note is not None:
            LOG.warning("%s", note)
        if self._report:
            write_page(merge_page(self._recorder.header, records, name), path / PAGE_NAME)
        if options.write_model_card:
            write_card(
                self._recipe,
                path,
                name,
                self._recorder.header,
                records,
                notes=self._journal.notes,
                sources=self._source.folders,
            )

    def close(self) -> None:
        """Let go of files."""
        if self._bar is not None:
            self._bar.close()
        if self._recorder is not None:
            self._recorder.abort()
        if self._journal is not None:
            self._journal.close()
        self._opened.close()

    def _sync(self) -> None:
        self._writer.sync()

    def _take(self, record: TensorRecord) -> None:
        self._pending[record.tensor] = record

    def _store(self, unit: Unit, tensor: Tensor) -> None:
        self._written(unit, self._writer.write(unit.name, tensor), self._pending.pop(unit.name, None))

    def _came_back(self, unit: Unit, tensor: Tensor, record: TensorRecord | None) -> None:
        self._written(unit, self._writer.write(unit.name, tensor), record)

    def _written(self, unit: Unit, digest: str, record: TensorRecord | None) -> None:
        """Take note of a tensor that lies in its place."""
        known = record or _passed_on(unit, self._config)
        # Reasons name models; a report goes to the public with its model.
        said = {"sha256": digest, "reason": self._shown.public(known.reason)}
        line = known.model_copy(update=said).model_dump(mode="json", exclude_defaults=True)
        if self._journal is not None:
            self._journal.add(Done(unit.name, digest, line))
        self.has_results = True
        self._tell(unit, line)

    def _tell(self, unit: Unit, line: dict[str, Any] | None) -> None:
        record = TensorRecord.model_validate(line) if line is not None else _passed_on(unit, self._config)
        # From workers and from the run that this one goes on with, too.
        self._prepared.merge.note_survival(record.tensor, record.edit_survival)
        if self._bar is not None:
            self._bar.record(record)
        if self._recorder is not None:
            self._recorder.add(record)

    def _verified(self) -> dict[str, Done]:
        """Return the finished tensors whose bytes are what the journal says."""
        if self._journal is None:
            return {}
        self._journal.recheck(self._writer.stored_hash)
        return self._journal.kept


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
            files_from=run_options.files_from,
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
