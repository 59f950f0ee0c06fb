"""The update of a `base+lora` input from its factors, where mergekit hands over the rounded merge."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import TensorEntry, TensorMetadata
from torch import Tensor

from mergekit_monosoup.checkpoint.pinned import source_of
from mergekit_monosoup.errors import AdapterError, UnsupportedAdapterError
from mergekit_monosoup.lora.adapter import read_adapter
from mergekit_monosoup.lora.factors import LowRankUpdate, mean_of

if TYPE_CHECKING:
    from mergekit_monosoup.lora.placement import Change, Placement

LOG = logging.getLogger(__name__)

# Share of entries that may differ from the merged copy by more than its rounding.
_OUTLIERS = 0.01


@dataclass(frozen=True)
class ExactUpdate:
    """dW of one tensor, kept apart: `dense` + `low_rank`; neither is an update of zero."""

    dense: Tensor | None = None
    low_rank: LowRankUpdate | None = None

    @property
    def is_zero(self) -> bool:
        """Whether the adapter leaves the tensor alone."""
        return self.dense is None and self.low_rank is None

    def materialise(self, like: Tensor) -> Tensor:
        """Return dW in the shape, dtype and place of `like`."""
        dw = torch.zeros_like(like) if self.dense is None else self.dense.to(like)
        if self.low_rank is not None:
            dw = dw + self.low_rank.materialise(like.dtype, like.device)
        return dw


class Adapters:
    """The adapters of one merge, each read and placed on its base once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._known: dict[ModelReference, Placement | None] = {}
        self._sources: dict[tuple[str, ModelReference], str | None] = {}
        self._warned: set[str] = set()

    def exact_update(
        self, entry: TensorEntry, base: TensorEntry, metadata: TensorMetadata
    ) -> ExactUpdate | None:
        """Return the update of an input that carries an adapter on the base, or None for other inputs.

        None also stands for adapters that are not linear and for tensors that are stored in another form
        than the model class has; both are named once in a warning, and take the merged weights.

        Args:
            entry: the input; `entry.tensor` is what mergekit merged and rounded.
            base: the base of the group.
            metadata: the tensor's name.

        Raises:
            AdapterError: the adapter is damaged or of another base, or the merged copy is not of this
                adapter and tensor.
        """
        reference, name = entry.id, metadata.name
        if not isinstance(reference, ModelReference) or reference.lora is None or name is None:
            return None
        if not same_base(reference, base.id):
            self._warn(
                str(reference),
                f"its update is taken from the merged weights: base_model is {base.id}, "
                f"not {reference.model}",
            )
            return None
        source = self._sources.get((name, reference), name)
        if source is None:
            self._warn(
                str(reference),
                f"its update of {name}, and of others like it, is taken from the merged weights, because "
                "other layers of the base are merged with it",
            )
            return None
        placed = self._placed(reference)
        if placed is None:
            return None
        try:
            change = placed.change_of(source)
        except UnsupportedAdapterError as error:
            self._warn(
                str(reference),
                f"the update of {name}, and of others like it, is taken from the merged weights ({error})",
            )
            return None
        update = update_of(change, base.tensor)
        if update is not None and self._is_that_of(entry, base, update, metadata):
            return update
        if metadata.vocabulary_axis is not None:
            self._warn(
                f"{reference}, {name}",
                "the update is taken from the merged weights, because tokens were rearranged",
            )
            return None
        raise AdapterError(
            f"tensor {name}: the merged copy of {reference} is not base + adapter. Either it was left in "
            "the LoRA cache by another version of the adapter (delete that folder; `mergekit-monosoup merge` "
            "needs none), or slices renumber the layers (set `exact_lora: false`)"
        )

    def made_of(self, reference: ModelReference, output: str, source: str | None) -> None:
        """Take note that an input is base + adapter and no merged copy, so that it needs no witness.

        Args:
            reference: the input.
            output: the tensor's name in the output.
            source: its name in the base; None where the base takes part with another tensor.
        """
        with self._lock:
            self._sources[output, reference] = source

    def _is_that_of(
        self, entry: TensorEntry, base: TensorEntry, update: ExactUpdate, metadata: TensorMetadata
    ) -> bool:
        # Rows of a vocabulary may have been rearranged on the way, whatever they were made of.
        if (metadata.name, entry.id) in self._sources and metadata.vocabulary_axis is None:
            return True
        return _agrees(entry.tensor, base.tensor, update)

    def _placed(self, reference: ModelReference) -> Placement | None:
        # Not before an adapter is met: the methods must register whatever peft's modules look like inside.
        from mergekit_monosoup.lora.adapted import adapted_loader
        from mergekit_monosoup.lora.hollow import place

        loader = adapted_loader(LoaderCache.loaders.get(reference))
        if loader is not None:
            return loader.placement
        with self._lock:
            if reference not in self._known:
                try:
                    adapter = read_adapter(source_of(reference.lora))
                    self._known[reference] = place(reference, adapter, LoaderCache().trust_remote_code)
                except UnsupportedAdapterError as error:
                    self._known[reference] = None
                    self._warn(
                        str(reference),
                        f"its update is taken from the merged weights, rounding included ({error})",
                    )
            return self._known[reference]

    def _warn(self, subject: str, message: str) -> None:
        """Give a warning once for each subject."""
        with self._lock:
            if subject not in self._warned:
                self._warned.add(subject)
                LOG.warning("%s: %s", subject, message)


def same_base(reference: ModelReference, base: object) -> bool:
    """Say whether a reference names the model `base`, without an adapter, before its own."""
    if isinstance(base, str):
        base = ModelReference.parse(base)
    return (
        isinstance(base, ModelReference)
        and base.lora is None
        and _spelled(base.model) == _spelled(reference.model)
    )


def _spelled(path: ModelPath) -> str:
    return os.path.realpath(path.path) if os.path.exists(path.path) else str(path)


def update_of(change: Change | None, base: Tensor) -> ExactUpdate | None:
    """Return the update that an adapter stands for, given the base's tensor; None where the shapes differ."""
    if change is None:
        return ExactUpdate()
    dense = None
    if change.whole is not None:
        if change.whole.shape != base.shape:
            return None
        w0 = base if base.dtype == torch.float64 else base.float()
        dense = change.whole.to(w0) - w0
        # A frozen embedding saved along may be the base before it was rounded for storage.
        if not bool((dense.abs() > (_spacing(base) * w0.abs() if change.frozen else 0)).any()):
            dense = None
    if change.rows is not None:
        indices, values = change.rows
        if base.ndim != 2 or values.shape[1:] != base.shape[1:] or int(indices.max()) >= len(base):
            return None
        w0 = base if base.dtype == torch.float64 else base.float()
        dense = torch.zeros_like(w0) if dense is None else dense
        indices = indices.to(w0.device)
        dense = dense.index_copy(0, indices, values.to(w0) - w0[indices])
    if change.shift is not None:
        shift = change.shift.to(device=base.device, dtype=torch.float32)
        dense = shift if dense is None else dense + shift
    if any(u.shape != tuple(base.shape) for u in change.low_rank):
        return None
    low_rank = mean_of(change.low_rank, [1.0] * len(change.low_rank)) if change.low_rank else None
    if low_rank is not None and len(change.low_rank) == 1:
        low_rank = change.low_rank[0]
    return ExactUpdate(dense, low_rank)


def _agrees(merged: Tensor, base: Tensor, update: ExactUpdate) -> bool:
    """Say whether the merged tensor is base + update, up to the rounding of the merge.

    The values are taken from the factors; the merge is only the witness that they belong to this tensor.
    """
    if merged.shape != base.shape:
        return False
    eps = _spacing(merged)
    w0 = base.float()
    if update.is_zero:
        difference, size, peak = merged.float() - w0, w0.abs(), 0.0
    else:
        dw = update.materialise(w0)
        size, peak = w0.abs() + dw.abs(), float(dw.abs().max())
        difference = merged.float() - (w0 + dw)
    # Below its normal numbers, float16 has a fixed spacing.
    floor = torch.finfo(torch.float16).smallest_normal if eps == torch.finfo(torch.float16).eps else 0.0
    off = difference.abs() > eps * (size + floor) + 1e-5 * peak
    return float(off.float().mean()) <= _OUTLIERS if off.numel() else True


def _spacing(tensor: Tensor) -> float:
    """Return the relative spacing of the coarsest dtype that holds the values as they are."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)):
            return torch.finfo(dtype).eps
    return torch.finfo(tensor.dtype).eps
