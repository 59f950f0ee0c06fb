"""Tensors of one kind in a row: the layers of a model say the same many times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_monosoup.planning.planned import PlannedTensor

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Folded:
    """Tensors that differ in the numbers within their names alone."""

    name: str
    tensors: tuple[PlannedTensor, ...]


def folded(tensors: Sequence[PlannedTensor]) -> list[Folded]:
    """Return the kinds of tensors, in the order of their first.

    Tensors are of a kind if their names are equal but for numbers, and what happens to them is the same.
    A kind is written `model.layers.{0..27}.mlp.up_proj.weight`.
    """
    kinds: dict[tuple[object, ...], list[PlannedTensor]] = {}
    for tensor in tensors:
        pattern = _NUMBER.sub("#", tensor.tensor)
        kind = (pattern, tensor.action, tensor.shape, tensor.dtype, tensor.view, tensor.why)
        kinds.setdefault(kind, []).append(tensor)
    return [Folded(_common_name([t.tensor for t in group]), tuple(group)) for group in kinds.values()]


def _common_name(names: Sequence[str]) -> str:
    numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    columns = iter(zip(*numbers, strict=True))
    return _NUMBER.sub(lambda _: _ranges(sorted(set(next(columns)))), names[0])


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in parts) + "}"
