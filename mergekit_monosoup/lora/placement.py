"""What an adapter does to the tensors of a checkpoint, found by any name that a tensor is stored under."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mergekit_monosoup.errors import UnsupportedAdapterError
from mergekit_monosoup.lora.factors import LowRankUpdate


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor: any of a new value, new rows, an added tensor and low-rank updates.

    `frozen` says that the new value is the base's own, saved along; `rows` are indices along the first axis
    and the values that replace them; `exact` is False where peft changes the tensor in a way that is none
    of these.
    """

    whole: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None
    shift: Tensor | None = None
    low_rank: tuple[LowRankUpdate, ...] = ()
    exact: bool = True
    frozen: bool = False


class NameMap:
    """Names of a checkpoint's tensors, old and new, to those of the model class."""

    def __init__(self, model: Any) -> None:
        self._shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        self._shapes |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
        self._known = dict.fromkeys(self._shapes, True)
        self._config = model.config if hasattr(model, "config") else None
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = getattr(model, "base_model_prefix", None)
        self._renames: dict[str, tuple[str, str | None]] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def resolve(self, name: str) -> str | None:
        """Return the model's name of a tensor, or None where it is stored in another form or is none."""
        if name in self._shapes:
            return name
        renamed, converter = self._renamed(name)
        return renamed if converter is None and renamed in self._shapes else None

    def wholes(self, name: str) -> set[str]:
        """Return the tensors of the model that a stored one becomes a part of; none where it is no part."""
        stack, pattern = self._renamed(name)
        if pattern is None:
            return set()
        targets = self._converter(pattern).target_patterns
        return {stack.replace(targets[0], target, 1) for target in targets}

    def rows(self, name: str, whole: str) -> Tensor:
        """Return which rows of a tensor of the model a stored one becomes.

        A stack `[matrices, rows, columns]` counts matrices * rows rows.

        Raises:
            UnsupportedAdapterError: it is not made of whole rows.
        """
        _, pattern = self._renamed(name)
        with self._lock:
            if whole not in self._parts:
                self._parts[whole] = self._split(whole, self._converter(str(pattern)))
            parts = self._parts[whole]
        rows = parts.get(self._renamed_only(name))
        if rows is None:
            raise UnsupportedAdapterError(f"{name} is stored in another form than the model class has")
        return rows

    def _renamed(self, name: str) -> tuple[str, str | None]:
        if name not in self._renames:
            self._renames[name] = rename_source_key(
                name, self._renamings, self._converters, self._prefix, self._known
            )
        return self._renames[name]

    def _converter(self, pattern: str) -> WeightConverter:
        return next(c for c in self._converters if pattern in c.source_patterns)

    def _renamed_only(self, name: str) -> str:
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    def _split(self, whole: str, converter: WeightConverter) -> dict[str, Tensor]:
        """Let transformers take a tensor apart whose entries are the numbers of its rows."""
        shape = self._shapes[whole]
        count = shape[0] * shape[1] if len(shape) == 3 else shape[0]
        numbers = torch.arange(count, device="cpu").reshape(*shape[:-1], 1)
        try:
            reverse: Any = copy.deepcopy(converter).reverse_transform()
            renamed, pattern = reverse.rename_source_key(whole)
            reverse.add_tensor(renamed, whole, pattern, numbers)
            split = reverse.convert(renamed, config=self._config)
        except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise UnsupportedAdapterError(
                f"{whole} cannot be taken apart into what is stored: {error}"
            ) from error
        parts = {}
        for name, value in split.items():
            rows = value[0] if isinstance(value, list) else value
            if rows.shape[-1] == 1:
                parts[self._renamed_only(name)] = rows.reshape(-1)
        return parts


@dataclass(frozen=True)
class Placement:
    """An adapter on its base: the names of the base's tensors, and what happens to those that it touches."""

    names: NameMap
    changes: Mapping[str, Change]
    ties: Mapping[str, Sequence[str]]
    """The names of each parameter that has several."""

    def change_of(self, name: str) -> Change | None:
        """Return what happens to a tensor of a checkpoint, None where it is left alone.

        Raises:
            UnsupportedAdapterError: it is stored in another form than the model class has, or peft changes
                it in a way that is not linear.
        """
        key = self.names.resolve(name)
        change = self.changes.get(key) if key is not None else None
        if key is None and (touched := self.names.wholes(name) & self.changes.keys()):
            if len(touched) > 1:
                raise UnsupportedAdapterError(f"{name} is stored in another form than the model class has")
            (whole,) = touched
            change = _rows_of(self.changes[whole], self.names.rows(name, whole), name)
        if change is not None and not change.exact:
            raise UnsupportedAdapterError(f"peft changes {name} in a way that is not linear")
        return change


def _rows_of(change: Change, rows: Tensor, name: str) -> Change:
    if change.whole is not None or change.rows is not None or change.shift is not None:
        raise UnsupportedAdapterError(f"{name} is part of a tensor that the adapter stores whole")
    parts = []
    for update in change.low_rank:
        height = update.left.shape[1]
        matrix = int(rows[0]) // height
        if bool((rows // height != matrix).any()):
            raise UnsupportedAdapterError(f"{name} is made of several matrices of a stack")
        left = update.left[matrix, rows % height]
        shape = (len(rows), update.right.shape[2])
        parts.append(LowRankUpdate(left[None], update.right[matrix : matrix + 1], update.scaling, shape))
    return replace(change, low_rank=tuple(parts))
