"""A base with a linear adapter on it, read as a checkpoint of its own that is nowhere on disk."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from mergekit_monosoup.checkpoint.dequantised import has_scales
from mergekit_monosoup.checkpoint.float8 import DEQUANTISED, FLOAT8, dequantise, missing_scale
from mergekit_monosoup.checkpoint.headers import header_of
from mergekit_monosoup.checkpoint.pinned import source_of
from mergekit_monosoup.checkpoint.scales import is_scale, scale_name
from mergekit_monosoup.errors import AdapterError
from mergekit_monosoup.lora.adapter import Adapter, read_adapter
from mergekit_monosoup.lora.hollow import place
from mergekit_monosoup.lora.placement import Change, Placement

LOG = logging.getLogger(__name__)

_QUANTISED = re.compile(r"[-_.](bnb|gptq|awq|hqq|[48]-?bit|int[48]|nf4|fp8|w4a16)\b", re.IGNORECASE)


class AdaptedLoader(LazyTensorLoader):
    """The tensors of a base as peft would merge an adapter into them, each when it is asked for.

    Names are the base's, and those of tensors that only the adapter has, such as a new head. A float8
    base is read as numbers, so that it has no scales.
    """

    def __init__(
        self,
        base_model: ModelReference,
        base: LazyTensorLoader,
        adapter: Adapter,
        placement: Placement,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take a base that mergekit has opened.

        Args:
            base_model: the base, as mergekit's loaders know it.
            base: its loader.
            adapter: its folder is where the hashes of the report come from.
            placement: of the adapter on this base.
            dtype: what the base is cast to before the adapter is merged; its own where None.

        Raises:
            UnsupportedAdapterError: a tensor that the adapter touches has to be merged by peft itself.
            AdapterError: the base has no such tensor.
        """
        self.base_model, self.base, self.folder = base_model, base, adapter.folder
        self.placement, self.dtype = placement, dtype
        held, shards = base.index.tensor_paths, base.index.shards
        self.is_float8 = has_scales(held)
        paths = {name: shard for name, shard in held.items() if not is_scale(name, held)}
        for name in paths:
            placement.change_of(name)
        self.own = _own_tensors(placement, paths)
        self._refuse_strangers(adapter, paths)
        index = ShardedTensorIndex(
            base_path=base.index.base_path,
            is_safetensors=base.index.is_safetensors,
            tensor_paths={**paths, **dict.fromkeys(self.own, SAFETENSORS_WEIGHTS_NAME)},
            shards=[
                *(ShardInfo(s.filename, [k for k in s.contained_keys if k in paths]) for s in shards),
                *([ShardInfo(SAFETENSORS_WEIGHTS_NAME, list(self.own))] if self.own else []),
            ],
        )
        super().__init__(index, base.lazy_unpickle)

    @classmethod
    def open(
        cls,
        reference: ModelReference,
        base_model: ModelReference,
        base: LazyTensorLoader,
        *,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
    ) -> AdaptedLoader:
        """Read the adapter of a reference and place it on its base.

        Raises:
            AdapterError: the adapter is damaged or of another base.
            UnsupportedAdapterError: the adapter has to be merged by peft itself.
        """
        adapter = read_adapter(source_of(reference.lora))
        trained_on = str(adapter.settings.get("base_model_name_or_path") or "")
        if _QUANTISED.search(trained_on):
            LOG.info("%s: trained on %s, a quantised copy of its base", reference.lora, trained_on)
        return cls(base_model, base, adapter, place(reference, adapter, trust_remote_code), dtype)

    def _refuse_strangers(self, adapter: Adapter, held: Iterable[str]) -> None:
        """Refuse a base of which an adapter changes what is stored under no name that the class knows."""
        names = self.placement.names
        known = {name for held_name in held for name in (names.resolve(held_name), *names.wholes(held_name))}
        known |= set(self.own)
        for name in self.placement.changes:
            if known.isdisjoint({name, *self.placement.ties.get(name, ())}):
                raise AdapterError(
                    f"adapter {adapter.source} changes {name}, and {self.base_model} stores nothing under a "
                    "name that its class knows as that; save the base by transformers first"
                )

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> Tensor | None:
        """Return a tensor as peft would merge it, like the loader of a checkpoint."""
        names = [key, *(aliases or [])]
        name = next((name for name in names if name in self.index.tensor_paths), None)
        if name is None:
            if raise_on_missing:
                raise KeyError(key)
            return None
        if name in self.own:
            return self.own[name].to(device)
        return self.adapted(name, self._stored(name, device))

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """Return what the base stores a tensor in, None where no header says so."""
        return self._dtypes.get(name)

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        index = self.base.index
        headers = [header_of(Path(index.base_path) / shard.filename) for shard in index.shards]
        return {name: getattr(torch, held.dtype) for header in headers for name, held in header.items()}

    def flush(self) -> None:
        """Let go of the base's files."""
        self.base.flush()

    def adapted(self, name: str, w0: Tensor) -> Tensor:
        """Return W0 + dW for a tensor of the base, rounded as peft's `merge_and_unload` rounds it.

        Args:
            name: in the base's files or in the model class.
            w0: its values; on the meta device, only shape and dtype are found out.
        """
        w0 = w0 if self.dtype is None or not w0.is_floating_point() else w0.to(self.dtype)
        change = self.placement.change_of(name)
        return w0 if change is None else merge_into(w0, change)

    def shapes(
        self, base: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor, given those of the base."""
        found = {}
        for name in self.index.tensor_paths:
            if name in self.own:
                found[name] = (tuple(self.own[name].shape), self.own[name].dtype)
            elif name in base:
                shape, dtype = base[name]
                dtype = DEQUANTISED if dtype in FLOAT8 else dtype
                like = self.adapted(name, torch.empty(shape, dtype=dtype, device="meta"))
                found[name] = (tuple(like.shape), like.dtype)
        return found

    def _stored(self, name: str, device: str) -> Tensor:
        tensor: Tensor = self.base.get_tensor(name, device=device)
        if tensor.dtype not in FLOAT8:
            return tensor
        scale = scale_name(name, self.base.index.tensor_paths)
        if scale is None:
            raise missing_scale(name, tensor.dtype, f" of {self.base_model}")
        return dequantise(tensor, self.base.get_tensor(scale, device=device), name).to(DEQUANTISED)


def merge_into(w0: Tensor, change: Change) -> Tensor:
    """Return W0 + dW in the dtype of W0, rounded where peft's `merge_and_unload` rounds."""
    if w0.is_meta:
        return w0 if change.whole is None else w0.new_empty(change.whole.shape)
    w = w0 if change.whole is None else change.whole.to(w0)
    if change.rows is not None:
        indices, values = change.rows
        w = w.index_copy(0, indices.to(w.device), values.to(w))
    for update in change.low_rank:
        dw = update.materialise(torch.promote_types(torch.float32, update.left.dtype), w.device)
        # Of a stack, peft rounds dW before it adds it.
        w = (w + (dw.to(w.dtype) if w.ndim == 3 else dw)).to(w.dtype)
    return w if change.shift is None else (w + change.shift.to(w.device)).to(w.dtype)


def _own_tensors(placement: Placement, held: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the whole tensors of an adapter that its base does not have."""
    known = {placement.names.resolve(name) for name in held}
    own = {}
    for name, change in placement.changes.items():
        if change.whole is None or name in known:
            continue
        # A tied tensor that the adapter stores under both its names is still one.
        others = [placement.changes.get(other) for other in placement.ties.get(name, ()) if other in known]
        if any(o is not None and o.whole is not None and torch.equal(o.whole, change.whole) for o in others):
            continue
        own[name] = change.whole
    return own


def adapted_loader(loader: object) -> AdaptedLoader | None:
    """Return a loader, or the one behind it, if it puts an adapter on its base."""
    loader = getattr(loader, "stored", loader)
    return loader if isinstance(loader, AdaptedLoader) else None
