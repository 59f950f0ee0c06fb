"""The report of a merge that our own command runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoint.headers import StoredTensor, read_folder
from mergekit_monosoup.merging.progress import Progress
from mergekit_monosoup.methods.reporting import checkpoint_folder
from mergekit_monosoup.report.inputs import InputHashes
from mergekit_monosoup.report.reader import FILE_NAME
from mergekit_monosoup.report.recorder import Recorder, new_header
from mergekit_monosoup.report.schema import TensorRecord


def merge_recorder(
    recipe: str,
    config: MergeConfiguration,
    options: MergeOptions,
    staging: Path,
    bar: Progress | None,
    write: bool,
) -> Recorder:
    """Return the recorder of a merge.

    Args:
        recipe, config, options: of the merge.
        staging: where the merged model is written.
        bar: shows each tensor as it is done.
        write: whether to write `monosoup_report.jsonl`, with the hashes of the inputs.
    """
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


def _hashes(config: MergeConfiguration) -> InputHashes:
    base = config.base_model
    others = sorted((m for m in config.referenced_models() if m != base), key=str)
    models: list[tuple[str, Literal["base", "finetuned"], Path]] = []
    for model in [base, *others] if base is not None else others:
        folder = checkpoint_folder(model)
        if folder is not None:
            models.append((str(model), "base" if model == base else "finetuned", folder))
    return InputHashes(models)


def record_copied(recorder: Recorder, staging: Path, config: MergeConfiguration) -> None:
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
