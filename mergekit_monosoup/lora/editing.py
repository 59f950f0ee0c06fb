"""The edit of whole adapters: one, or the average of several, with or without a change of rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mergekit_monosoup.errors import AdapterError, ConfigurationError, ParameterError, ShapeMismatchError
from mergekit_monosoup.lora.adapter import PREFIX, AdaptedModule, Adapter, plain_name
from mergekit_monosoup.lora.factors import LowRankUpdate, edit_factors, mean_of, rank_for, truncate
from mergekit_monosoup.lora.settings import settings_for
from mergekit_monosoup.spectral.crew import at_work, crew
from mergekit_monosoup.spectral.edit import edit_update
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.record import EditRecord
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split

LOG = logging.getLogger(__name__)

T = TypeVar("T")
Rank = int | float | Literal["auto"] | None
# Given the name of a tensor in the base model: the tensor, or None where the base has none of that name.
BaseLookup = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class AdapterOptions:
    """How an adapter is edited.

    `split`, `mixing` and `alpha` are those of the merge method; `rank` is the rank of the result: None
    for that of the input (for several, the sum), a number, a share of the energy in (0, 1), or `auto` for
    the split index of each module.
    """

    split: Split = EFFECTIVE_RANK
    mixing: Mixing = "monosoup"
    alpha: float = 1.0
    rank: Rank = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ParameterError(f"alpha is {self.alpha}; it must be a finite number >= 0")
        if isinstance(self.rank, int) and self.rank < 1:
            raise ParameterError(f"rank is {self.rank}; it must be at least 1")
        if isinstance(self.rank, float) and not 0 < self.rank < 1:
            raise ParameterError(f"rank is {self.rank}; as a share of the energy it must be in (0, 1)")


@dataclass(frozen=True)
class ModuleRecord:
    """What was done to one tensor: the edit, the rank it is stored with, and the error of that."""

    name: str
    edit: EditRecord
    rank: int
    truncation_error: float


@dataclass(frozen=True)
class EditedAdapter:
    """An edited adapter, ready to be written: its settings, its tensors, and what was done."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    records: tuple[ModuleRecord, ...]
    kept: tuple[str, ...]


def edit_adapters(
    adapters: Sequence[Adapter], options: AdapterOptions, base: BaseLookup | None = None
) -> EditedAdapter:
    """Edit one adapter, or the average of several, without their base model.

    Every pair of factors is edited as `edit_factors` does; several adapters are averaged with equal
    weights, their factors side by side. Tensors that an adapter stores whole are edited against `base`
    where it is given; without it they stay as they are, and `kept` names them.

    Args:
        adapters: of one base model; a module that only some of them adapt has no update in the others.
        options: see `AdapterOptions`.
        base: looks up tensors of the base model.

    Raises:
        AdapterError: the adapters share no module, or a whole tensor is not in all of them.
        ConfigurationError: the asked rank is larger than that of the input.
        ShapeMismatchError: the adapters are of bases of different sizes.
    """
    names = list(dict.fromkeys(m.module for a in adapters for m in a.modules))
    tables = [{m.module: m for m in adapter.modules} for adapter in adapters]
    _refuse_strangers(adapters, tables)
    ranks = {} if options.rank is None else _ranks(names, adapters, tables, options)
    order = {key: i for i, key in enumerate(key for adapter in adapters for key in adapter.tensors)}

    def edit(name: str) -> tuple[AdaptedModule, ModuleRecord, dict[str, Tensor]]:
        module, update = _mean(name, adapters, tables)
        update, record = edit_factors(update, split=options.split, mixing=options.mixing)
        update = replace(update, left=update.left * options.alpha)
        error = 0.0
        if options.rank is not None:
            update, error = truncate(update, ranks[name])
        first = next(a for a, table in zip(adapters, tables, strict=True) if name in table)
        return module, ModuleRecord(name, record, update.rank, error), _stored(module, update, first)

    edited = _in_parallel(edit, names)
    tensors = {key: tensor for _, _, stored in edited for key, tensor in stored.items()}
    kept = _whole_tensors(adapters, tables, options, base, tensors)
    records = tuple(record for _, record, _ in edited)
    settings = settings_for(adapters, {r.name: (module, r.rank) for module, r, _ in edited})
    return EditedAdapter(
        settings, dict(sorted(tensors.items(), key=lambda item: order[item[0]])), records, kept
    )


def _stored(module: AdaptedModule, update: LowRankUpdate, first: Adapter) -> dict[str, Tensor]:
    """Return the two tensors of a module in the form and dtype in which they were stored."""
    tensors = {}
    for key, flat in zip((module.key_a, module.key_b), module.store(update), strict=True):
        stored = first.tensors[key]
        # Kernels of convolutions follow the first axis of A and the second of B.
        tail = stored.shape[1:] if key == module.key_a else (flat.shape[1], *stored.shape[2:])
        tensors[key] = flat.reshape(flat.shape[0], *tail).to(stored.dtype).contiguous()
    return tensors


def _in_parallel(function: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Apply a function to each name, one module a thread.

    The matrices are small and many: threads inside one factorisation would wait for each other.
    """
    with at_work(torch.device("cpu")):
        return crew().map(function, names)


def _refuse_strangers(adapters: Sequence[Adapter], tables: Sequence[Mapping[str, AdaptedModule]]) -> None:
    for adapter, table in zip(adapters[1:], tables[1:], strict=True):
        if not set(table) & set(tables[0]):
            raise AdapterError(
                f"adapters {adapters[0].source} and {adapter.source} have no module in common "
                f"({next(iter(tables[0]), None)} against {next(iter(table), None)}); are they of one base?"
            )


def _mean(
    name: str, adapters: Sequence[Adapter], tables: Sequence[Mapping[str, AdaptedModule]]
) -> tuple[AdaptedModule, LowRankUpdate]:
    present = [(a, t[name]) for a, t in zip(adapters, tables, strict=True) if name in t]
    module = present[0][1]
    try:
        updates = [m.update(a.tensors) for a, m in present]
        if len(adapters) == 1:
            return module, updates[0]
        mean = mean_of(updates, [1 / len(adapters)] * len(updates), module.scaling)
    except ShapeMismatchError as error:
        sources = " and ".join(a.source for a, _ in present)
        raise ShapeMismatchError(f"module {name} of {sources}: {error}; are they of one base?") from error
    return replace(module, rank=mean.rank), mean


def _ranks(
    names: Sequence[str],
    adapters: Sequence[Adapter],
    tables: Sequence[Mapping[str, AdaptedModule]],
    options: AdapterOptions,
) -> dict[str, int]:
    """Return the rank that each module is stored with; parameters of one module share theirs."""
    wanted = options.rank

    def rank_of(name: str) -> int:
        _, update = _mean(name, adapters, tables)
        if isinstance(wanted, int):
            if wanted > update.rank:
                raise ConfigurationError(
                    f"rank {wanted} is larger than that of module {name}, {update.rank}; ask for less, or "
                    "leave --rank out"
                )
            return wanted
        edited, record = edit_factors(update, split=options.split, mixing=options.mixing)
        if wanted == "auto":
            return max((m.k for m in record.matrices), default=1)
        return update.rank if wanted is None else rank_for(edited, wanted)

    ranks = dict(zip(names, _in_parallel(rank_of, names), strict=True))
    largest: dict[str, int] = {}
    for name, rank in ranks.items():
        largest[plain_name(name)] = max(rank, largest.get(plain_name(name), 1))
    return {name: largest[plain_name(name)] for name in ranks}


def _whole_tensors(
    adapters: Sequence[Adapter],
    tables: Sequence[Mapping[str, AdaptedModule]],
    options: AdapterOptions,
    base: BaseLookup | None,
    tensors: dict[str, Tensor],
) -> tuple[str, ...]:
    """Add the tensors that are no factors to `tensors`; return the keys of those left unedited."""
    kept = []
    for key in dict.fromkeys(key for a in adapters for key in a.biases):
        # c b, the update of a bias, has fewer than two axes: it is averaged and scaled, not split.
        module = key.removeprefix(PREFIX).removesuffix(".lora_B.bias")
        total, scaling = torch.zeros((), device="cpu"), 0.0
        for adapter, table in zip(adapters, tables, strict=True):
            if key in adapter.biases:
                scaling = scaling or table[module].scaling
                total = total + adapter.tensors[key].float() * table[module].scaling / len(adapters)
        stored = next(a.tensors[key] for a in adapters if key in a.biases)
        tensors[key] = (total / scaling * options.alpha).to(stored.dtype)
    for key in dict.fromkeys(key for a in adapters for key in a.full):
        tensor, was_kept = _whole_tensor(key, adapters, options, base)
        tensors[key] = tensor
        if was_kept:
            kept.append(key)
    return tuple(kept)


def _whole_tensor(
    key: str, adapters: Sequence[Adapter], options: AdapterOptions, base: BaseLookup | None
) -> tuple[Tensor, bool]:
    values = [a.tensors[key] for a in adapters if key in a.full]
    # The frozen weight under an adapted embedding, which peft saves along; a bias there is trained.
    frozen = key.endswith(".base_layer.weight")
    w0 = None
    if base is not None and not frozen and "token_adapter" not in key:
        w0 = base(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    if len(values) < len(adapters) and w0 is None and not frozen:
        raise AdapterError(
            f"{key} is in some of the adapters only; give --base, so that the others can stand for the base's"
        )
    if any(v.shape != values[0].shape for v in values):
        raise ShapeMismatchError(f"{key} has different shapes in the adapters")
    if w0 is None or w0.shape != values[0].shape or not values[0].is_floating_point():
        mean = values[0] if len(values) == 1 else torch.stack([v.float() for v in values]).mean(0)
        return mean.to(values[0].dtype), not frozen
    w0 = w0.float()
    dw = torch.stack([v.float() - w0 for v in values]).sum(0) / len(adapters)
    if dw.ndim >= 2:
        dw, _ = edit_update(dw, split=options.split, mixing=options.mixing)
    return (w0 + options.alpha * dw).to(values[0].dtype), False
