"""The one call by which a merge method says what it did with a tensor."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.merge_methods.base import (
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)

from mergekit_monosoup.checkpoint.lineage import Relation, relation, unrelated
from mergekit_monosoup.methods.outcomes import Outcome, tell
from mergekit_monosoup.report.inputs import InputHashes
from mergekit_monosoup.report.measure import tensor_record
from mergekit_monosoup.report.recorder import Recorder, close_files, is_recording, new_header, send
from mergekit_monosoup.report.rounding import sample
from mergekit_monosoup.report.schema import Action
from mergekit_monosoup.spectral.crew import torch_threads
from mergekit_monosoup.spectral.edit import EditRecord

LOG = logging.getLogger(__name__)

REPORT = ParameterSpec(
    "report",
    str | None,
    ParameterScope.SHARED,
    default=None,
    description="file to write one record a tensor to (JSON lines)",
)

# The base is judged by the first few matrices of each fine-tuned checkpoint, once a merge.
_SAMPLED_TENSORS = 9
_FEWEST_TENSORS = 3
_LOCK = threading.Lock()
_SEEN: dict[str, list[Relation]] = {}
_WARNED: set[str] = set()


def begin_merge() -> None:
    """Forget the last merge of this process and complete its reports."""
    with _LOCK:
        _SEEN.clear()
        _WARNED.clear()
    close_files()


def note(
    group: TensorGroup,
    spec: MergeMethodSpec,
    action: Action,
    reason: str = "",
    *,
    report: str | None = None,
    update_norm: float | None = None,
    edit: EditRecord | None = None,
    weights: Sequence[float] | None = None,
    started: float | None = None,
    parameters: Mapping[str, Any] | None = None,
    figures: Mapping[str, float] | None = None,
) -> None:
    """Record what was done with a group; costs next to nothing where nobody listens.

    Args:
        group: the inputs, base among them; float8 dequantised.
        spec: of the merge method.
        action, reason: what happened to the tensor and why.
        report: value of the parameter `report`.
        update_norm: ||dW||_F of the averaged update before any edit, where it is known.
        edit: record of the spectral edit.
        weights: of the average over the group's non-base entries.
        started: `time.perf_counter()` at the start of the work.
        parameters: as they were for this tensor; the method's defaults are left out.
        figures: numbers that only this method has.
    """
    name = group.metadata.name or ""
    tell(Outcome(name, action, reason, edit))
    if group.base is None:
        return
    _watch_base(group, group.base)
    if not is_recording(report):
        return
    defaults = {parameter.name: parameter.default for parameter in spec.parameters}
    # torch's own threads would still be spinning when the next edit begins.
    with torch_threads(1):
        record = tensor_record(
            name,
            group.base.tensor,
            [entry.tensor for entry in group.non_base],
            action=action,
            reason=reason,
            weights=weights,
            edit=edit,
            update_norm=update_norm,
            started=started,
            method=spec.name,
            parameters={k: v for k, v in (parameters or {}).items() if v != defaults[k]},
            figures=dict(figures or {}),
        )
    send(record, report, lambda path: _file_recorder(path, spec.name, group))


def relation_of(name: str, base: torch.Tensor, finetuned: torch.Tensor) -> Relation | None:
    """Return how a fine-tuned tensor lies to its base, from a sample of their entries."""
    if base.shape != finetuned.shape:
        return None
    w0, w1 = (sample(t).double() for t in (base, finetuned))
    dw = w1 - w0
    return relation(name, float(w0.norm()), float(w1.norm()), float(dw.norm()), float(dw @ w0))


def _watch_base(group: TensorGroup, base: TensorEntry) -> None:
    """Warn once a merge when the values say that the base is none."""
    if base.tensor.ndim < 2 or base.tensor.numel() == 0:
        return
    for entry in group.non_base:
        label = str(entry.id)
        with _LOCK:
            seen = _SEEN.setdefault(label, [])
            full = len(seen) >= _SAMPLED_TENSORS or label in _WARNED
        if full:
            continue
        found = relation_of(group.metadata.name or "", base.tensor, entry.tensor)
        if found is None:
            continue
        with _LOCK:
            seen.append(found)
            message = unrelated(str(base.id), label, seen) if len(seen) >= _FEWEST_TENSORS else None
            new = message is not None and label not in _WARNED
            if new:
                _WARNED.add(label)
        if new:
            LOG.warning("%s", message)


def _file_recorder(path: Path, method: str, group: TensorGroup) -> Recorder:
    models: list[tuple[str, Literal["base", "finetuned"], Path]] = [
        (str(entry.id), "base" if entry.is_base else "finetuned", folder)
        for entry in sorted(group.entries, key=lambda e: not e.is_base)
        if (folder := checkpoint_folder(entry.id)) is not None
    ]
    device = str(group.entries[0].tensor.device)
    return Recorder(new_header(method=method, device=device), path, hashes=InputHashes(models))


def checkpoint_folder(model: object) -> Path | None:
    """Return where mergekit has a checkpoint's files, None where it has not opened it."""
    # Imported here: both bring transformers, which a mere registration must not.
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if not isinstance(model, ModelReference):
        return None
    loader = LoaderCache.loaders.get(model)
    return None if loader is None else Path(loader.index.base_path)
