"""Edit weights in memory: state dicts and modules of any library."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from mergekit.merge_methods.base import PerGroupValues, TensorEntry, TensorGroup, TensorMetadata
from torch import Tensor, nn

from mergekit_monosoup.checkpoint.float8 import dequantise_state_dict
from mergekit_monosoup.errors import ConfigurationError, InputError, MissingTensorError
from mergekit_monosoup.methods.contract import MERGE, UpdateMethod
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.outcomes import Outcome
from mergekit_monosoup.registry import our_methods
from mergekit_monosoup.report.recorder import Recorder, new_header
from mergekit_monosoup.spectral.parts import PartsStore

StateDict = Mapping[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

# How much of each model is moved to the device of the computation at a time.
_CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class EditedWeights:
    """The edited `weights`, under the names of the fine-tuned model, and what became of each tensor."""

    weights: dict[str, Tensor]
    outcomes: tuple[Outcome, ...]


@torch.no_grad()
def edit_state_dict(
    base: StateDict | nn.Module,
    finetuned: StateDict | nn.Module | Sequence[StateDict | nn.Module],
    *,
    method: str = "monosoup",
    strict: bool = True,
    device: torch.device | str | None = None,
    parts: PartsStore | None = None,
    **parameters: Any,
) -> EditedWeights:
    """Apply a merge method of this package to weights in memory.

    `{"state_dict": ...}` around a state dict and `module.` before all of its names (as data-parallel
    training leaves them) are seen through. Buffers that are not floating-point are copied from the
    first fine-tuned model; float8 weights with scales become bfloat16 without.

    Args:
        base: the weights that the fine-tuning started from; a state dict or a module.
        finetuned: the fine-tuned weights, or several for the average of their updates.
        method: name of the merge method.
        strict: refuse tensors that the base does not have in the same shape; otherwise they are
            kept as the first fine-tuned model has them.
        device: where to compute; by default where the fine-tuned weights lie.
        parts: keeps the two parts of each update for further edits of the same weights.
        **parameters: of the method (`energy`, `alpha`, `mixing`, ...); a function is called with the
            name of each tensor and returns the value for it.

    Returns:
        The weights, in the dtype and on the device of the (first) fine-tuned model, and one outcome for
        each tensor.

    Raises:
        InputError: an argument is no state dict, or its values cannot be used.
        MissingTensorError: with `strict`, tensors without a counterpart of the same shape.
        ConfigurationError: unknown method or parameter.
    """
    models = [finetuned] if isinstance(finetuned, (Mapping, nn.Module)) else list(finetuned)
    if not models:
        raise ConfigurationError("no fine-tuned weights are given; pass one state dict or module, or several")
    merge_method = _checked_method(method, parameters)
    report = parameters.pop("report", None)
    w0 = _plain(base, "base")
    tuned = [_plain(model, f"fine-tuned model {i}") for i, model in enumerate(models, 1)]
    first = tuned[0]
    kept = _without_counterpart(w0, tuned)
    if strict and kept:
        lines = "\n  ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise MissingTensorError(
            f"these tensors have no counterpart; pass strict=False to keep the fine-tuned ones:\n  {lines}"
        )
    reasons = {name: kept[name] for name in kept if name in first}
    reasons |= {
        n: "not floating-point" for n, t in first.items() if n not in kept and not t.is_floating_point()
    }
    merged: dict[str, Tensor] = {name: first[name].clone() for name in reasons}
    found = {name: Outcome(name, "copied", reason) for name, reason in reasons.items()}
    shared = _shared_storage([name for name in first if name not in merged], w0, tuned)
    owners = [name for name, owner in shared.items() if owner == name]
    collected: list[Outcome] = []
    with ExitStack() as files:
        # One file, in however many parts the weights are merged.
        recorder = Recorder(new_header(method=method), Path(report)) if report is not None else None
        if recorder is not None:
            files.enter_context(recorder)
        merge = Merge(
            "base",
            tuple(f"finetuned {i}" for i in range(1, len(tuned) + 1)),
            on_outcome=[collected.append],
            on_record=[recorder.add] if recorder is not None else [],
            parts=parts,
        )
        bound = merge_method.within(merge)
        # As they lie: nothing is moved for a decision over all of them.
        groups = [_group(name, w0, tuned) for name in owners]
        # Models may lie on several devices, which mergekit refuses of a group; names and shapes will do.
        shapes = [_group(name, w0, tuned, torch.device("meta")) for name in owners]
        bound.begin(groups, [{**p, MERGE: merge} for p in _bound(bound, shapes, parameters, owners)])
        for names in _chunks(owners, first):
            place = torch.device(device) if device is not None else first[names[0]].device
            moved = [_group(name, w0, tuned, place) for name in names]
            results = bound(moved, parameters=_for_names(parameters, names))
            for name, tensor in zip(names, results, strict=True):
                result = tensor.to(first[name].device, first[name].dtype)
                # A tensor that is kept comes back as it went in.
                merged[name] = result.clone() if result.data_ptr() == first[name].data_ptr() else result
        merge.close()
    found |= {outcome.tensor: outcome for outcome in collected}
    for name, owner in shared.items():
        if owner != name:
            merged[name] = merged[owner]
            found[name] = Outcome(name, "copied", f"the same tensor as {owner}")
    prefix = _prefix(models[0])
    left_out = [Outcome(name, "left out", reason) for name, reason in kept.items() if name not in first]
    return EditedWeights(
        {prefix + name: merged[name] for name in first}, (*(found[name] for name in first), *left_out)
    )


def edit_module(
    base: StateDict | nn.Module,
    finetuned: Module,
    *,
    inplace: bool = False,
    strict: bool = True,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[Module, tuple[Outcome, ...]]:
    """Return the fine-tuned module with edited weights, and what became of each tensor.

    Args:
        base: the weights that the fine-tuning started from.
        finetuned: the fine-tuned module; its weights are edited on the device where they lie.
        inplace: change `finetuned` itself instead of a copy.
        strict: see `edit_state_dict`, as for the next two.
        device: where it is computed.
        **options: of the edit.
    """
    edited = edit_state_dict(base, finetuned, strict=strict, device=device, **options)
    module = finetuned if inplace else copy.deepcopy(finetuned)
    module.load_state_dict(edited.weights)
    return module, edited.outcomes


def _group(
    name: str, base: StateDict, tuned: Sequence[StateDict], device: torch.device | None = None
) -> TensorGroup:
    entries = [TensorEntry("base", base[name].to(device), is_base=True)]
    entries += [TensorEntry(f"finetuned {i}", state[name].to(device)) for i, state in enumerate(tuned, 1)]
    return TensorGroup(tuple(entries), TensorMetadata(name))


def _bound(
    method: UpdateMethod, groups: Sequence[TensorGroup], parameters: Mapping[str, Any], names: Sequence[str]
) -> list[dict[str, Any]]:
    bound: list[dict[str, Any]] = method._bind_parameters(groups, _for_names(parameters, names))
    return bound


def _plain(model: StateDict | nn.Module, label: str) -> dict[str, Tensor]:
    """Return the bare state dict: unwrapped, names without `module.`, float8 dequantised."""
    state: Any = model.state_dict() if isinstance(model, nn.Module) else model
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{label} is {type(model).__name__}; a non-empty state dict or a module is needed")
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise InputError(
            f"{label}: entry {wrong[0]!r} is {type(state[wrong[0]]).__name__}, not a tensor; pass the part "
            "of the checkpoint that is the state dict"
        )
    prefix = _prefix(state)
    return dequantise_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})


def _prefix(model: Any) -> str:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    state = state.get("state_dict", state)
    return "module." if all(name.startswith("module.") for name in state) else ""


def _without_counterpart(base: StateDict, tuned: Sequence[StateDict]) -> dict[str, str]:
    """Return the tensors that cannot be compared, with the reason."""
    reasons = {}
    for name in dict.fromkeys(name for state in (*tuned, base) for name in state):
        if name not in base:
            reasons[name] = "not in the base"
        elif missing := [i for i, state in enumerate(tuned, 1) if name not in state]:
            reasons[name] = f"not in fine-tuned model {missing[0]}"
        elif other := [s[name].shape for s in tuned if s[name].shape != base[name].shape]:
            reasons[name] = f"{tuple(other[0])} here, {tuple(base[name].shape)} in the base"
    return reasons


def _shared_storage(names: Sequence[str], base: StateDict, tuned: Sequence[StateDict]) -> dict[str, str]:
    """Map each name to the first one that is the same tensor in all models (tied weights)."""
    owners: dict[Any, str] = {}
    return {
        name: owners.setdefault(tuple(_identity(state[name], name) for state in (base, *tuned)), name)
        for name in names
    }


def _identity(tensor: Tensor, name: str) -> Any:
    # Tensors without storage (empty, or on the meta device) all have the address 0.
    return (tensor.data_ptr() or name, tensor.device, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _chunks(names: Sequence[str], state: StateDict) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for name in names:
        nbytes = state[name].numel() * state[name].element_size()
        if chunk and (size + nbytes > _CHUNK_BYTES or state[name].device != state[chunk[0]].device):
            yield chunk
            chunk, size = [], 0
        chunk.append(name)
        size += nbytes
    if chunk:
        yield chunk


def _for_names(parameters: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {
        key: PerGroupValues([value(name) for name in names]) if callable(value) else value
        for key, value in parameters.items()
    }


def _checked_method(name: str, parameters: Mapping[str, Any]) -> UpdateMethod:
    methods = {method.spec.name: method for method in our_methods()}
    if name not in methods:
        raise ConfigurationError(f"method {name!r} is not one of {', '.join(methods)}")
    known = {parameter.name for parameter in methods[name].spec.parameters}
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise ConfigurationError(f"{name} has no parameter {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return methods[name]
