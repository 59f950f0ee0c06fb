"""Float8 inputs of a merge: their scales, read from the checkpoint that mergekit has opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_monosoup.checkpoint.float8 import DEQUANTISED, FLOAT8, dequantise, missing_scale
from mergekit_monosoup.checkpoint.scales import is_scale, scale_name
from mergekit_monosoup.errors import QuantizedWeightError

if TYPE_CHECKING:
    from mergekit.io import LazyTensorLoader
    from mergekit.merge_methods.base import TensorEntry, TensorGroup


def dequantised(group: TensorGroup) -> tuple[TensorGroup, torch.dtype]:
    """Replace float8 inputs by their values in float32.

    Scales are looked up in the checkpoints: mergekit hands on the stored numbers alone, and has
    already widened them where the recipe sets a `dtype`.

    Returns:
        The group, and the dtype that the result is to be stored in: that of the inputs, or bfloat16
        where this is float8.

    Raises:
        QuantizedWeightError: a float8 weight without a scale, or scales merged as tensors.
    """
    stored = group.entries[0].tensor.dtype
    entries = tuple(_dequantised(entry, group.metadata.name) for entry in group.entries)
    if all(new is old for new, old in zip(entries, group.entries, strict=True)):
        return group, stored
    widened = tuple(replace(entry, tensor=entry.tensor.float()) for entry in entries)
    return replace(group, entries=widened), DEQUANTISED if stored in FLOAT8 else stored


def _dequantised(entry: TensorEntry, name: str | None) -> TensorEntry:
    # Imported here and below: it brings transformers, which a mere registration must not.
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    loader = LoaderCache.loaders.get(entry.id) if isinstance(entry.id, ModelReference) else None
    held = loader.index.tensor_paths if loader is not None else {}
    scale = scale_name(name, held) if name is not None else None
    value: Tensor | None = None
    if loader is not None and name is not None and scale is not None:
        raw = loader.get_tensor(name)
        if raw.dtype in FLOAT8:
            value = dequantise(raw, loader.get_tensor(scale), name).to(entry.tensor.device)
    elif loader is not None and name is not None and name not in held and has_scales(held):
        value = _converted(entry, loader, name)
    elif entry.tensor.dtype in FLOAT8:
        raise missing_scale(str(name), entry.tensor.dtype, f" of {entry.id}")
    return entry if value is None else replace(entry, tensor=value)


def has_scales(held: Mapping[str, str]) -> bool:
    """Say whether a checkpoint holds scales of weights at all, by the names of its tensors."""
    return any(is_scale(name, held) for name in held)


def _converted(entry: TensorEntry, loader: LazyTensorLoader, name: str) -> Tensor | None:
    """Fuse tensors as mergekit has done for this one, after dequantising each; None where it was renamed."""
    from mergekit.architecture.conversion import convert_checkpoint_tensors
    from mergekit.io.tasks import LoaderCache

    held = loader.index.tensor_paths

    def source(key: str) -> Callable[[], Tensor]:
        def load() -> Tensor:
            tensor = loader.get_tensor(key, device="cpu")
            scale = scale_name(key, held)
            return tensor if scale is None else dequantise(tensor, loader.get_tensor(scale), key)

        return load

    model_type = entry.id.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
    sources = {key: source(key) for key in held if not is_scale(key, held)}
    tensor: Tensor | None = convert_checkpoint_tensors(model_type, sources, name)
    if tensor is None:
        if entry.tensor.dtype in FLOAT8:
            raise missing_scale(name, entry.tensor.dtype, f" of {entry.id}")
        return None
    if tensor.shape != entry.tensor.shape:
        raise QuantizedWeightError(
            f"tensor {name} of {entry.id} cannot be dequantised while mergekit fuses it; dequantise the "
            "checkpoint first"
        )
    return tensor.to(entry.tensor.device)
