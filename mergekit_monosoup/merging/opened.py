"""The checkpoints of a merge as mergekit has opened them, under names that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.options import MergeOptions

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.classes import is_language_model_of
from mergekit_monosoup.checkpoint.headers import Checkpoint, StoredTensor, header_of, read_config
from mergekit_monosoup.checkpoint.naming import with_common_names
from mergekit_monosoup.lora.adapted import AdaptedLoader


def open_with_common_names(
    config: MergeConfiguration, *, as_stored: bool = False
) -> dict[ModelReference, Checkpoint]:
    """Return the checkpoints of a recipe; mergekit's loaders know their tensors by the common names, too.

    The fine-tuned checkpoints come first, in the order of the recipe, and the base last. What is seen
    through has been said by the plan.

    Args:
        config: the recipe, whose checkpoints mergekit has opened.
        as_stored: leave the names as they are in the files.

    Raises:
        InputError: the names differ by prefixes that nobody knows.
    """
    models = list(finetuned_models(config))
    if config.base_model is not None:
        models.append(config.base_model)
    opened = [opened_checkpoint(model) for model in models]
    if as_stored:
        return dict(zip(models, opened, strict=True))
    base = opened[models.index(config.base_model)] if config.base_model is not None else None
    renamed, _ = with_common_names(opened, base)
    for model, one in zip(models, renamed, strict=True):
        held = one.checkpoint.tensors
        host.rename_tensors(model, {n: one.stored.get(n, n) for n in held} if one.stored else {})
    return {model: one.checkpoint for model, one in zip(models, renamed, strict=True)}


def model_types(models: Iterable[ModelReference], options: MergeOptions) -> list[object]:
    """Return the types of opened checkpoints whose code is not to be run; none where it is."""
    if options.trust_remote_code:
        return []
    return [read_config(Path(host.folder_of(m))).get("model_type") for m in models if m.lora is None]


def finetuned_models(config: MergeConfiguration) -> tuple[ModelReference, ...]:
    """Return the models of a recipe besides its base, in the order in which they are listed."""
    owners = [config, *(config.modules or {}).values()]
    listed = [entry.model for owner in owners for entry in owner.models or ()]
    listed += [s.model for owner in owners for part in owner.slices or () for s in part.sources]
    return tuple(dict.fromkeys(model for model in listed if model != config.base_model))


def described_by(
    checkpoints: Mapping[ModelReference, Checkpoint], config: MergeConfiguration
) -> ModelReference:
    """Return the checkpoint whose configuration the output has.

    The first fine-tuned one; but of a language model beside the base's other parts, which are kept, the
    base.
    """
    first = next(iter(checkpoints))
    base = config.base_model
    whole = base is not None and is_language_model_of(checkpoints[first], checkpoints[base])
    return base if whole and base is not None else first


def opened_checkpoint(model: ModelReference) -> Checkpoint:
    """Return configuration and headers of a checkpoint, an adapter merged into it where it has one."""
    loader = host.stored_loader(model)
    folder = Path(loader.index.base_path)
    tensors = _adapted_headers(loader) if isinstance(loader, AdaptedLoader) else _headers(loader)
    config = read_config(folder)
    if model.override_architecture:
        config = {**config, "architectures": [model.override_architecture]}
    return replace(Checkpoint(str(model), config, tensors, folder), adapter=model.lora and str(model.lora))


def _headers(loader: LazyTensorLoader) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in loader.index.shards:
        held = header_of(Path(loader.index.base_path) / shard.filename)
        tensors |= {name: held[name] for name in shard.contained_keys if name in held}
    return tensors


def _adapted_headers(loader: AdaptedLoader) -> dict[str, StoredTensor]:
    """Return what a base's tensors look like with an adapter on it, and those that only the adapter has."""
    base = _headers(loader.base)
    shapes = loader.shapes({n: (t.shape, getattr(torch, t.dtype)) for n, t in base.items()})
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        spelled = str(dtype).removeprefix("torch.")
        file = loader.index.tensor_paths[name]
        alike = name in base and (base[name].shape, base[name].dtype) == (shape, spelled)
        tensors[name] = base[name] if alike else StoredTensor(name, shape, spelled, file)
    return tensors
