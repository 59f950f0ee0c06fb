"""`base+adapter` inputs of a merge: base and factors, without a merged copy where the adapter is linear."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.errors import UnsupportedAdapterError
from mergekit_monosoup.lora.adapted import AdaptedLoader, adapted_loader
from mergekit_monosoup.lora.cache import prepare_lora_cache
from mergekit_monosoup.methods.merge import Merge

LOG = logging.getLogger(__name__)


# Folder of a run for what peft has to merge.
MERGED_ADAPTERS = "merged-adapters"


@contextmanager
def adapters_opened(config: MergeConfiguration, options: MergeOptions, folder: Path) -> Iterator[None]:
    """Open the `base+adapter` inputs of a recipe, and forget them in the end with their merged copies.

    Args:
        config, options: of the merge.
        folder: for merged copies; made where it is needed, removed in the end.

    Raises:
        AdapterError: an adapter is damaged, or of another base.
    """
    try:
        open_adapters(config, options, folder)
        yield
    finally:
        for model in config.referenced_models():
            if model.lora is not None:
                LoaderCache.loaders.pop(model, None)
        shutil.rmtree(folder, ignore_errors=True)


def open_adapters(config: MergeConfiguration, options: MergeOptions, folder: Path) -> None:
    """Open the `base+adapter` inputs of a recipe under mergekit's loaders.

    A linear adapter is read beside its base. What peft has to merge itself is merged into the cache that
    the options name, or else into `folder`.

    Args:
        config, options: of the merge.
        folder: for merged copies; made where it is needed.

    Raises:
        AdapterError: an adapter is damaged, or of another base.
    """
    references = sorted({model for model in config.referenced_models() if model.lora is not None}, key=str)
    others = [model for model in references if not _open_linear(model, config, options)]
    if options.lora_merge_cache and len(others) < len(references):
        LOG.info("--lora-merge-cache is not needed: linear adapters are read beside their base")
    if others:
        cache = options.lora_merge_cache or str(folder)
        copying = options.model_copy(update={"lora_merge_cache": cache})
        prepare_lora_cache(others, copying)
        host.open_models(others, copying)


def _open_linear(reference: ModelReference, config: MergeConfiguration, options: MergeOptions) -> bool:
    """Open an adapter beside its base; say whether it could be done."""
    base_model = _base_of(reference, config)
    host.open_models([base_model], options)
    try:
        LoaderCache.loaders[reference] = AdaptedLoader.open(
            reference,
            base_model,
            LoaderCache().get(base_model),
            trust_remote_code=options.trust_remote_code,
            dtype=dtype_from_name(options.lora_merge_dtype),
        )
    except UnsupportedAdapterError as error:
        LOG.info("%s: merged by peft into a copy of the base first (%s)", reference, error)
        return False
    return True


def _base_of(reference: ModelReference, config: MergeConfiguration) -> ModelReference:
    """Return the base of a reference, as the recipe names it where it does, so that it is opened once."""
    listed = [m for m in config.referenced_models() if m.lora is None and m.model == reference.model]
    return listed[0] if listed else reference.model_copy(update={"lora": None})


def stored_model(model: ModelReference) -> ModelReference:
    """Return the model whose files are read for an opened one: the base of a linear adapter, else itself."""
    loader = adapted_loader(host.loader_of(model))
    return model if loader is None else loader.base_model


class AdaptedTensor(Task[Tensor | None]):
    """A tensor of a base with an adapter on it, made of the base's tensor, which is read once for both."""

    model: ModelReference
    tensor: str
    base: LoadTensor
    dtype: str | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the base's tensor."""
        return {"base": self.base}

    def execute(self, base: Tensor | None) -> Tensor | None:
        """Return W0 + dW, rounded as peft's merge rounds it, and then as the recipe has it."""
        loader = adapted_loader(host.loader_of(self.model))
        if base is None or loader is None:
            return None
        # As stored, although the recipe may have widened it: that is where peft rounds.
        stored = loader.stored_dtype(self.tensor)
        value = loader.adapted(self.tensor, base if stored is None else base.to(stored))
        dtype = dtype_from_name(self.dtype)
        return value if dtype is None else value.to(dtype)

    def group_label(self) -> str | None:
        """Return the place of the base's tensor."""
        label: str | None = self.base.group_label()
        return label

    def uses_accelerator(self) -> bool:
        """Say that the product of the factors may be taken on a device."""
        return True


class AdaptedGather(GatherTensors):
    """Gather the inputs of a tensor, those with adapters from base and factors."""

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks of the inputs."""
        return {key: _adapted(task) for key, task in super().arguments().items()}


def with_adapters(task: Task[Any], merge: Merge) -> Task[Any]:
    """Return a tensor's task with its `base+adapter` inputs taken from base and factors.

    Args:
        task: as mergekit plans it.
        merge: is told which inputs need no witness.
    """
    if not isinstance(task, ExecuteMergeMethodTask):
        return task
    inputs = task.gather_tensors
    gather = inputs if isinstance(inputs, GatherTensors) else getattr(inputs, "gather_tensors", None)
    if not isinstance(gather, GatherTensors):
        return task
    weights = dict(gather.weight_info.items())
    adapted = [model for model in weights if adapted_loader(host.loader_of(model)) is not None]
    if not adapted:
        return task
    for model in adapted:
        name = weights[model].name
        same = task.base_model in weights and weights[task.base_model].name == name
        merge.adapters.made_of(model, task.output_weight.name, name if same else None)
    by_factors = AdaptedGather(**dict(gather))
    if gather is inputs:
        return task.model_copy(update={"gather_tensors": by_factors})
    return task.model_copy(
        update={"gather_tensors": inputs.model_copy(update={"gather_tensors": by_factors})}
    )


def _adapted(task: LoadTensor) -> Task[Any]:
    """Return a task that makes the tensor of an adapted base of the base's own; others as they are."""
    loader = host.loader_of(task.model)
    # Under other names than those in its files, the loader does it too.
    if not isinstance(loader, AdaptedLoader) or host.loader_of(loader.base_model) is not loader.base:
        return task
    name = host.stored_name(task)
    # A float8 tensor is read with its scale: the loader does it.
    if name in loader.own or loader.is_float8:
        return task
    stored = loader.stored_dtype(name) if name is not None else None
    base = task.model_copy(update={"model": loader.base_model})
    names = [name] if name is not None else [task.tensor, *(task.aliases or ())]
    touched = next((n for n in names if loader.placement.change_of(n) is not None), None)
    if touched is None and loader.dtype is None:
        return base
    wanted = dtype_from_name(task.dtype)
    if stored is None or (wanted is not None and torch.promote_types(stored, wanted) != wanted):
        # The base is rounded after the adapter has been merged, not before.
        base = base.model_copy(update={"dtype": None})
    return AdaptedTensor(model=task.model, tensor=touched or names[0], base=base, dtype=task.dtype)
