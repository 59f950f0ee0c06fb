"""Modules with weights of their own in sub-folders (sentence-transformers): merged like the rest."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConfigReader, MergeConfiguration, evaluate_setting
from mergekit.merge_methods import get as merge_method
from mergekit.merge_methods import merge_state_dicts
from mergekit.merge_methods.base import ParameterScope, PerGroupValues
from mergekit.options import MergeOptions
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_monosoup.checkpoint.companions import weight_folders, weights_in
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.merging.files import source_of
from mergekit_monosoup.methods.outcomes import Outcome
from mergekit_monosoup.report.measure import edit_fields
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.state_dicts import edit_state_dict

LOG = logging.getLogger(__name__)

StateDict = Mapping[str, Tensor]


def merge_modules(
    config: MergeConfiguration,
    options: MergeOptions,
    source: Path,
    out: Path,
    *,
    ours: bool,
    taken: Sequence[ModelReference] | None = None,
) -> list[TensorRecord]:
    """Write the merged weights of a model's modules into their folders; return what was done.

    They are merged by the recipe's own method and parameters; gradients count as at the first layer. A
    module that the base does not have keeps the weights of the source.

    Args:
        config, options: of the merge.
        source: folder of the checkpoint that the files of the result come from.
        out: folder of the result.
        ours: whether the method is one of this package.
        taken: the models that a method has decided on for the whole model; their average is the result.
    """
    names = weight_folders(source)
    if not names:
        return []
    models = [config.base_model] if config.base_model is not None else []
    models += [model for model in _listed(config) if model not in models]
    folders = {model: source_of(model, options).folder for model in models}
    records = []
    for name in names:
        states = {model: _read(file) for model in models if (file := weights_in(folders[model] / name))}
        own = _read(weights_in(source / name))
        result, outcomes = _merged(name, own, states, config, ours, taken)
        result = {key: _stored(tensor, config) for key, tensor in result.items()}
        _write(result, out / name)
        records += [_record(config, name, result[o.tensor], o) for o in outcomes if o.tensor in result]
    return records


def copy_modules(source: Path, out: Path) -> list[str]:
    """Copy the weights of a model's modules, where nothing is known of a base; return the files."""
    names = weight_folders(source)
    for name in names:
        _write(_read(weights_in(source / name)), out / name)
        LOG.warning("the weights of module %s are those of %s, unedited", name, source.name)
    return [f"{name}/model.safetensors" for name in names]


def _listed(config: MergeConfiguration) -> list[ModelReference]:
    from mergekit_monosoup.merging.opened import finetuned_models

    return list(finetuned_models(config))


def _merged(
    module: str,
    own: StateDict,
    states: Mapping[ModelReference, StateDict],
    config: MergeConfiguration,
    ours: bool,
    taken: Sequence[ModelReference] | None,
) -> tuple[dict[str, Tensor], Sequence[Outcome]]:
    base = config.base_model
    tuned = [model for model in states if model != base and (taken is None or model in taken)]
    if (ours and base not in states) or not tuned:
        why = "the base does not have it" if base not in states else "only the base has it"
        # What the base lacks, the plan has said.
        level = logging.INFO if base not in states else logging.WARNING
        LOG.log(
            level, "module %s keeps the weights of the checkpoint that the files come from: %s", module, why
        )
        return dict(own), [Outcome(name, "kept", why) for name in own]
    if ours and base is not None:
        method, parameters = config.merge_method, _parameters(config, tuned, own, module)
        if taken is not None:
            # The decision is made: their average is left.
            method, parameters = "monosoup", {"edit": False}
        found = edit_state_dict(
            states[base], [states[m] for m in tuned], method=method, strict=False, **parameters
        )
        return {name: found.weights[name] for name in found.weights}, found.outcomes
    shared = [n for n, t in own.items() if all(n in s and s[n].shape == t.shape for s in states.values())]
    merged = merge_state_dicts(
        {str(model): {name: state[name] for name in shared} for model, state in states.items()},
        config.merge_method,
        parameters=_parameters(config, list(states), {name: own[name] for name in shared}, module),
        base=str(base) if base in states else None,
    )
    return {**own, **merged}, ()


def _parameters(
    config: MergeConfiguration, models: Sequence[ModelReference], own: StateDict, module: str
) -> dict[str, Any]:
    """Return the recipe's parameters for the tensors of a module, as mergekit binds them."""
    reader = ConfigReader(config=config, t=0)
    base = config.base_model
    found: dict[str, Any] = {}
    for spec in merge_method(config.merge_method).spec.parameters:
        if spec.name == "report":
            continue

        def value(tensor: str, model: ModelReference | None, spec: Any = spec) -> Any:
            for settings in _sources(config, reader, model):
                setting = settings.get(spec.name)
                if setting is not None:
                    result = evaluate_setting(f"{module}.{tensor}", setting, 0, validate=spec.validate)
                    if result is not None:
                        return result
            return None

        if spec.scope == ParameterScope.SHARED:
            values = [value(tensor, None) for tensor in own]
            if any(v is not None for v in values):
                by_name = dict(zip(own, (spec.default if v is None else v for v in values), strict=True))
                found[spec.name] = _by_tensor(by_name, config)
            continue
        wanted = [m for m in models if spec.scope == ParameterScope.INPUT or m != base]
        each = [value("", model) for model in wanted]
        if any(v is not None for v in each):
            found[spec.name] = [spec.default if v is None else v for v in each]
    return found


def _by_tensor(values: Mapping[str, Any], config: MergeConfiguration) -> Any:
    from mergekit_monosoup.methods.contract import UpdateMethod

    if isinstance(merge_method(config.merge_method), UpdateMethod):
        return lambda name: values[name]
    return PerGroupValues(list(values.values()))


def _sources(config: MergeConfiguration, reader: ConfigReader, model: ModelReference | None) -> list[Any]:
    own = [e.parameters for e in config.models or () if model is not None and e.model == model]
    return [settings for settings in (*own, *reader.parameter_sources()) if settings]


def _read(file: Path | None) -> dict[str, Tensor]:
    if file is None:
        raise InputError("a module that modules.json names has no weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{file} cannot be read, or holds more than weights; save it again") from error
    return state


def _stored(tensor: Tensor, config: MergeConfiguration) -> Tensor:
    dtype = dtype_from_name(config.out_dtype or config.dtype)
    wanted = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return wanted.contiguous()


def _write(state: StateDict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def _record(config: MergeConfiguration, module: str, tensor: Tensor, outcome: Outcome) -> TensorRecord:
    fields: Mapping[str, Any] = edit_fields(outcome.edit) if outcome.edit is not None else {}
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return TensorRecord(
        tensor=f"{module}/{outcome.tensor}",
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        action=outcome.action if outcome.action != "left out" else "kept",
        reason=outcome.reason,
        method=config.merge_method,
        sha256=hashlib.sha256(data.data).hexdigest(),
        **fields,
    )
