"""Modules with weights of their own in sub-folders, as in sentence-transformers: merged like the rest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, evaluate_setting
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.companions import weight_folders, weights_in
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.merging.prepared import finetuned_models
from mergekit_monosoup.report.measure import edit_fields
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.state_dicts import edit_state_dict

LOG = logging.getLogger(__name__)


def merge_modules(config: MergeConfiguration, source: Path, out: Path, ours: bool) -> list[TensorRecord]:
    """Write the merged weights of a model's modules into their folders; return what was done.

    They are edited by the recipe's own method and parameters. A module that the base does not have keeps the
    fine-tuned weights, and so do all where the method is none of ours.

    Args:
        config: the recipe.
        source: folder of the checkpoint that the files of the result come from.
        out: folder of the result.
        ours: whether the method is one of this package.
    """
    records = []
    for name in weight_folders(source):
        tuned = [_weights(model, name) for model in finetuned_models(config)]
        base = _weights(config.base_model, name) if config.base_model is not None else None
        first = _read(weights_in(source / name))
        others = [state for state in tuned if state is not None]
        if ours and base is not None and others:
            found = edit_state_dict(
                base, others, method=config.merge_method, strict=False, **_parameters(config, name)
            )
            result = {key: tensor.contiguous() for key, tensor in found.weights.items()}
            records += [
                _record(config, name, result[outcome.tensor], outcome)
                for outcome in found.outcomes
                if outcome.action != "left out"
            ]
        else:
            why = (
                "the base does not have it" if base is None else f"{config.merge_method} is not applied to it"
            )
            LOG.warning("module %s keeps the fine-tuned weights: %s", name, why)
            result = first
            records += [_kept(config, name, key, tensor, why) for key, tensor in first.items()]
        (out / name).mkdir(parents=True, exist_ok=True)
        save_file(result, out / name / "model.safetensors", metadata={"format": "pt"})
    return records


def _weights(model: ModelReference | None, name: str) -> dict[str, Tensor] | None:
    if model is None:
        return None
    file = weights_in(Path(host.folder_of(model)) / name)
    return None if file is None else _read(file)


def _read(file: Path | None) -> dict[str, Tensor]:
    if file is None:
        raise InputError("a module that modules.json names has no weights")
    if file.suffix == ".safetensors":
        return load_file(file)
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _parameters(config: MergeConfiguration, module: str) -> dict[str, Any]:
    def value_of(setting: Any) -> Any:
        return lambda name: evaluate_setting(f"{module}.{name}", setting, 0)

    return {
        key: value_of(setting)
        for key, setting in (config.parameters or {}).items()
        if key not in ("report", "weight", "score")
    }


def _record(config: MergeConfiguration, module: str, tensor: Tensor, outcome: Any) -> TensorRecord:
    fields: Mapping[str, Any] = edit_fields(outcome.edit) if outcome.edit is not None else {}
    return TensorRecord(
        tensor=f"{module}/{outcome.tensor}",
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        action=outcome.action,
        reason=outcome.reason,
        method=config.merge_method,
        **fields,
    )


def _kept(config: MergeConfiguration, module: str, name: str, tensor: Tensor, why: str) -> TensorRecord:
    return TensorRecord(
        tensor=f"{module}/{name}",
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        action="kept",
        reason=why,
        method=config.merge_method,
    )
