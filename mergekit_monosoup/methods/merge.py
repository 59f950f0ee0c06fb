"""One merge: what its tensors share, handed from hand to hand."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mergekit_monosoup.checkpoint.lineage import BaseWatch
from mergekit_monosoup.checkpoint.vocabulary import rows_kept
from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.methods.outcomes import MergedWeight, Outcome
from mergekit_monosoup.report.inputs import InputHashes
from mergekit_monosoup.report.measure import tensor_record
from mergekit_monosoup.report.recorder import Recorder, new_header
from mergekit_monosoup.report.rounding import sample
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.report.survival import lost_to_rounding
from mergekit_monosoup.spectral.crew import torch_threads
from mergekit_monosoup.spectral.parts import PartsStore

if TYPE_CHECKING:
    from mergekit.merge_methods.base import MergeMethodSpec, TensorEntry, TensorGroup

    from mergekit_monosoup.lora.exact import Adapters

LOG = logging.getLogger(__name__)


# Told apart by identity: two merges of the same checkpoints are two merges.
@dataclass(eq=False)
class Merge:
    """The checkpoints of one merge, its one decision, the adapters it has read, and who hears of its tensors.

    Args:
        base, finetuned: ids of the checkpoints, as tensor groups name them; unknown where tensors are
            merged without a recipe.
        on_outcome: is told what became of each tensor; costs nothing.
        on_record: is told in figures; each tensor is then measured.
        stored_dtypes: in which dtype each tensor will be stored in the end, by its name, where that is known
            and may differ from what a method returns.
        rows_kept: of embeddings of which only some rows are merged, the shape in the output and the number
            of rows that the fine-tuned checkpoint alone has.
        decision: what was decided once for all tensors.
        align: measures all checkpoints' updates against each other, given which tensors count and
            whether adapters go by their factors; absent: they are read here.
        parts: keeps the two parts of updates for the next merge of the same checkpoints; absent: nobody does.
    """

    base: Any = None
    finetuned: tuple[Any, ...] = ()
    on_outcome: Sequence[Callable[[Outcome], None]] = ()
    on_record: Sequence[Callable[[TensorRecord], None]] = ()
    stored_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    decision: Any = None
    rows_kept: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    align: Callable[[Any, bool], Any] | None = None
    parts: PartsStore | None = None
    _settings: dict[str, Any] = field(default_factory=dict)
    _settled_by: dict[str, str | None] = field(default_factory=dict)
    _files: dict[Path, Recorder] = field(default_factory=dict)
    _watch: BaseWatch = field(default_factory=BaseWatch)
    _survivals: dict[str, float] = field(default_factory=dict)
    _adapters: Adapters | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def adapters(self) -> Adapters:
        """The adapters of this merge, read once each."""
        with self._lock:
            if self._adapters is None:
                # Not before an adapter is met: it brings peft and transformers.
                from mergekit_monosoup.lora.exact import Adapters

                self._adapters = Adapters()
            return self._adapters

    def decide(self, settings: Mapping[str, Any], tensor: str | None, take: Callable[[], Any]) -> Any:
        """Return the decision of this merge, taking it if this tensor is the first to ask.

        Threads that ask meanwhile wait.

        Args:
            settings: the parameters that `tensor` was given, by the name the recipe would use.
            tensor: for the message.
            take: takes the decision.

        Raises:
            ParameterError: a parameter differs from what another tensor of the merge was given.
        """
        with self._lock:
            for key, value in settings.items():
                if self._settings.setdefault(key, value) != value:
                    raise ParameterError(
                        f"parameter {key!r} is {self._settings[key]!r} for tensor {self._settled_by[key]} "
                        f"and {value!r} for tensor {tensor}; the decision is taken once for the whole "
                        "model, so give one value, without filter or gradient"
                    )
                self._settled_by.setdefault(key, tensor)
            if self.decision is None:
                self.decision = take()
            return self.decision

    def decided(self) -> tuple[Any, dict[str, Any]] | None:
        """Return the decision and the settings it was taken under, to be handed to another process."""
        return None if self.decision is None else (self.decision, dict(self._settings))

    def settle(self, decided: tuple[Any, dict[str, Any]]) -> None:
        """Take over what `decided` returned elsewhere."""
        with self._lock:
            self.decision, self._settings = decided

    def record(
        self,
        group: TensorGroup,
        spec: MergeMethodSpec,
        merged: MergedWeight,
        *,
        report: str | None = None,
        started: float | None = None,
        weights: Sequence[float] | None = None,
        parameters: Mapping[str, Any] | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Tell what was done with a group; costs next to nothing where nobody listens.

        Args:
            group: the inputs, base among them; float8 dequantised.
            spec: of the merge method.
            merged: what became of it and why.
            report: value of the parameter `report`: a file of JSON lines.
            started: `time.perf_counter()` at the start of the work.
            weights: of the average over the group's non-base entries.
            parameters: as they were for this tensor; the method's defaults are left out.
            figures: numbers that only this method has.
        """
        name = group.metadata.name or ""
        shape, rows = self.rows_kept.get(name, (None, 0))
        reason = "; ".join(filter(None, (merged.reason, rows_kept(rows) if rows else "")))
        for tell in self.on_outcome:
            tell(Outcome(name, merged.action, reason, merged.edit))
        survival = merged.edit.survival if merged.edit is not None else merged.survival
        self.note_survival(name, survival)
        if group.base is None:
            return
        self._look_at_base(group, group.base)
        if not self.on_record and report is None:
            return
        defaults = {parameter.name: parameter.default for parameter in spec.parameters}
        # torch's own threads would still be spinning when the next edit begins.
        with torch_threads(1):
            record = tensor_record(
                name,
                group.base.tensor,
                [entry.tensor for entry in group.non_base],
                action=merged.action,
                reason=merged.reason,
                weights=weights,
                edit=merged.edit,
                update_norm=merged.update_norm,
                started=started,
                method=spec.name,
                parameters={k: v for k, v in (parameters or {}).items() if v != defaults[k]},
                figures=dict(figures or {}) | ({"rows_kept": rows} if rows else {}),
                edit_survival=survival,
            )
        if shape is not None:
            reason = "; ".join(filter(None, (record.reason, rows_kept(rows))))
            record = record.model_copy(update={"shape": shape, "reason": reason})
        for take in self.on_record:
            take(record)
        if report is not None:
            self._file(report, spec.name, group).add(record)

    def note_survival(self, tensor: str, survival: float | None) -> None:
        """Take note of what storage leaves of a tensor's edit, also where others have merged it."""
        if survival is not None and not math.isnan(survival):
            with self._lock:
                self._survivals[tensor] = survival

    def close(self) -> None:
        """Complete the reports that the recipe named; warn where rounding has undone much of the edits."""
        with self._lock:
            survivals, self._survivals = list(self._survivals.values()), {}
            done = list(self._files.values())
            self._files.clear()
        for recorder in done:
            with suppress(OSError):
                recorder.close()
                LOG.info("wrote the report %s", recorder.path)

        message = lost_to_rounding(survivals)
        if message is not None:
            LOG.warning("%s", message)

    def _look_at_base(self, group: TensorGroup, base: TensorEntry) -> None:
        """Warn once when the values say that the base is none."""
        if base.tensor.ndim < 2 or base.tensor.numel() == 0:
            return
        for entry in group.non_base:
            label = str(entry.id)
            if self._watch.has_seen_enough(label) or entry.tensor.shape != base.tensor.shape:
                continue
            w0, w1 = (sample(t).double().cpu().numpy() for t in (base.tensor, entry.tensor))
            message = self._watch.see(str(base.id), label, group.metadata.name or "", w0, w1)
            if message is not None:
                LOG.warning("%s", message)

    def _file(self, file: str, method: str, group: TensorGroup) -> Recorder:
        path = Path(file).expanduser().absolute()
        with self._lock:
            if path not in self._files:
                device = str(group.entries[0].tensor.device)
                self._files[path] = Recorder(
                    new_header(method=method, device=device), path, hashes=InputHashes(_folders(group))
                )
            return self._files[path]


def _folders(group: TensorGroup) -> list[tuple[str, Literal["base", "finetuned"], Path]]:
    return [
        (str(entry.id), "base" if entry.is_base else "finetuned", folder)
        for entry in sorted(group.entries, key=lambda e: not e.is_base)
        if (folder := checkpoint_folder(entry.id)) is not None
    ]


def checkpoint_folder(model: object) -> Path | None:
    """Return where a checkpoint's files are, or those of the adapter on it; None where it is not open."""
    # Imported here: both bring transformers, which a mere registration must not.
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if not isinstance(model, ModelReference):
        return None
    loader = LoaderCache.loaders.get(model)
    if loader is None:
        return None
    adapter: Path | None = getattr(getattr(loader, "stored", loader), "folder", None)
    return adapter or Path(loader.index.base_path)
