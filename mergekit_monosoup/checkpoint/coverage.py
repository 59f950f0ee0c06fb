"""Whether mergekit's definition of an architecture covers what the checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.architecture import WeightInfo
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mergekit_monosoup.checkpoint.classes import tied_names
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.scales import is_scale


@dataclass(frozen=True)
class Coverage:
    """What a plan leaves out of one checkpoint, and what it asks for in vain.

    `lost`: tensors of the checkpoint that the plan does not name; `absent`: tensors that the plan
    needs and that the checkpoint lacks.
    """

    lost: tuple[str, ...]
    absent: tuple[str, ...]


def check_coverage(weights: Sequence[WeightInfo], names: Iterable[str], model_type: str | None) -> Coverage:
    """Compare the weights of a plan with the tensors of a checkpoint.

    A tensor counts as covered under its own name, an alias, a tied name, or the name that it gets
    when transformers converts the checkpoint (renamed, or fused with others).

    Args:
        weights: the plan's weights, their names in full.
        names: the tensors of the checkpoint.
        model_type: as in its `config.json`; selects transformers' conversions.
    """
    transforms = _transforms(model_type)
    held = {name: _converted_names(name, transforms) for name in names}
    reachable = set().union(*held.values()) if held else set()
    asked = {w.name: {w.name, *(w.aliases or ()), *(w.tied_names or ())} for w in weights}
    planned = set().union(*asked.values()) if asked else set()
    lost = [name for name, converted in held.items() if not converted & planned and not is_scale(name, held)]
    optional = {w.name for w in weights if w.optional}
    absent = [name for name, any_of in asked.items() if name not in optional and not any_of & reachable]
    return Coverage(tuple(sorted(lost)), tuple(sorted(absent)))


def canonical_names(names: Iterable[str], model_type: str | None) -> dict[str, str]:
    """Return, by the name that transformers would give it, the name of each tensor.

    Only renamings are followed; where they bring two tensors together, the names stay as they are.
    """
    names = list(names)
    renamings = [t for t in _transforms(model_type) if isinstance(t, WeightRenaming)]
    canonical = {}
    for name in names:
        current = name
        for renaming in renamings:
            current = renaming.rename_source_key(current)[0]
        canonical[current] = name
    return canonical if len(canonical) == len(names) else {name: name for name in names}


def names_in_class(name: str, model_type: str | None) -> set[str]:
    """Return the names that a tensor of a checkpoint may have in transformers' class."""
    return _converted_names(name, _transforms(model_type))


def weights_named(names: Iterable[str], known: Iterable[WeightInfo]) -> list[WeightInfo]:
    """Return the weights of these names, with their aliases where they are known."""
    by_name = {weight.name: weight for weight in known}
    return [by_name.get(name) or WeightInfo(name=name) for name in names]


def describe(names: Sequence[str], limit: int = 8) -> str:
    """Name some tensors and count the rest."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def misfit(
    asked: Mapping[str, Sequence[WeightInfo]], models: Sequence[Checkpoint], label: str
) -> tuple[str, bool] | None:
    """Return what mergekit's definition asks for in vain or leaves out, None where it fits.

    Args:
        asked: the weights of the definition, by checkpoint.
        models: the checkpoints.
        label: what messages call the architecture.

    Returns:
        The message, and whether mergekit would fail.
    """
    lost = None
    for model in models:
        found = check_coverage(asked.get(model.name, ()), model.tensors, model.config.get("model_type"))
        if found.absent:
            asks = f"mergekit's definition of {label} asks for {describe(found.absent)}"
            return f"{asks}, not in {model.name}", True
        if found.lost and lost is None:
            lost = f"mergekit's definition of {label} leaves out {describe(found.lost)} of {model.name}"
    if lost is None and (name := _unknown_tie(asked, models)) is not None:
        lost = f"mergekit's definition of {label} does not know what the class ties {name} to"
    return (lost, False) if lost is not None else None


def _unknown_tie(asked: Mapping[str, Sequence[WeightInfo]], models: Sequence[Checkpoint]) -> str | None:
    """Return a tensor that some checkpoint has under another name, which its class ties to it."""
    for model in models:
        for weight in asked.get(model.name, ()):
            known = {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
            if not weight.optional or known & model.tensors.keys():
                continue
            held = any(weight.name in other.tensors for other in models)
            if held and (tied_names(model, weight.name) & model.tensors.keys()) - known:
                return str(weight.name)
    return None


def _transforms(model_type: str | None) -> list[Any]:
    # A copy each time: some of the transforms keep count of what they have seen.
    return get_checkpoint_conversion_mapping(model_type) or [] if model_type else []  # type: ignore[no-untyped-call]


def _converted_names(name: str, transforms: Iterable[Any]) -> set[str]:
    names = {name}
    for transform in transforms:
        for known in list(names):
            renamed, pattern = transform.rename_source_key(known)
            if pattern is None:
                continue
            targets = transform.target_patterns
            first = targets[0]
            names |= (
                {renamed.replace(first, target, 1) for target in targets} if first in renamed else {renamed}
            )
    return names
