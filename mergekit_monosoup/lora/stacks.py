"""How the factors of stacked experts are packed: two ways that no shape tells apart.

peft stores B of a stack as `[out, rank * experts]` with the expert running fastest (`rank_major`). Unsloth
trained it expert by expert (`grouped_by_expert`) until September 2026, and has marked both since then by
`lora_B_layout` in adapter_config.json. Without the marker the values are asked: the columns of one expert
were trained by the gradients of its own outputs alone, so they lie closer to each other than to others.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_monosoup.errors import AdapterError
from mergekit_monosoup.lora.said import warn_once

if TYPE_CHECKING:
    from mergekit_monosoup.lora.adapter import AdaptedModule

LOG = logging.getLogger(__name__)

MARKER = "lora_B_layout"
_PEFT, _GROUPED = "rank_major", "grouped_by_expert"
_DETAILS = "unsloth_fused_expert_lora"
# Between the two readings of trained stacks the mean squared cosine differs by factors of 2 to 20 and by
# hundreds of standard errors; of stacks without any structure, by less than these in all of ten thousand.
_FACTOR, _STANDARD_ERRORS = 1.5, 8.0
# Columns this alike were not trained apart: one adapter copied to all experts shows it the other way round.
_COPIES = 0.95


def with_peft_layout(
    source: str,
    settings: dict[str, Any],
    tensors: Mapping[str, Tensor],
    modules: Sequence[AdaptedModule],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors with every stack packed as peft packs it, and settings that say so.

    Args:
        source: of the adapter.
        settings: its adapter_config.json.
        tensors: as they are stored.
        modules: its pairs of factors.

    Raises:
        AdapterError: the marker has a value that is not known.
    """
    # With one expert or of rank 1, both are the same.
    stacks = [module for module in modules if module.experts > 1 and module.rank > 1]
    layout = settings.get(MARKER)
    if layout not in (None, _PEFT, _GROUPED):
        raise AdapterError(
            f"adapter {source}: {MARKER} is {layout!r}; known are {_PEFT!r} and {_GROUPED!r}, so its experts "
            "cannot be told apart"
        )
    packed = dict(tensors)
    if not stacks or layout == _PEFT:
        return packed, settings
    if layout is None:
        layout = layout_by_values([(tensors[m.key_b], m.experts) for m in stacks])
        if layout == _GROUPED:
            warn_once(
                LOG,
                "adapter %s: without %s, and the values of its stacked experts are packed expert by expert, "
                'not as peft packs them; read so. If wrong, add "%s": "%s" to its adapter_config.json',
                source,
                MARKER,
                MARKER,
                _PEFT,
            )
        elif layout is None:
            warn_once(
                LOG,
                "adapter %s: without %s, and the values of its stacked experts do not show how they are "
                "packed; read as peft packs them. If something else trained it (Unsloth before September "
                '2026), add "%s": "%s" to its adapter_config.json',
                source,
                MARKER,
                MARKER,
                _GROUPED,
            )
        if layout != _GROUPED:
            return packed, settings
    for module in stacks:
        b = tensors[module.key_b]
        grouped = b.reshape(b.shape[0], module.experts, module.rank)
        packed[module.key_b] = grouped.mT.reshape(b.shape).contiguous()
    settings = copy.deepcopy(settings)
    settings[MARKER] = _PEFT
    for detail in (settings.get(_DETAILS) or {}).get("parameters", {}).values():
        detail[MARKER] = _PEFT
    return packed, settings


def layout_by_values(stacks: Sequence[tuple[Tensor, int]]) -> str | None:
    """Return the packing that the columns of B speak for, None where they speak for neither.

    Compared are the mean squared cosines of pairs of columns that one or the other packing gives to one
    expert. For unrelated columns of d entries each is 1/d, with a variance of 2/d^2 a pair.

    Args:
        stacks: each B, `[out, rank * experts]` with a rank of at least 2, and its number of experts.
    """
    by_rank = grouped = difference = variance = 0.0
    for b, experts in stacks:
        unit = torch.nn.functional.normalize(b.reshape(len(b), -1).float(), dim=0)
        rank = unit.shape[1] // experts
        pairs = experts * rank * (rank - 1)
        first = _mean_cosine(unit.reshape(-1, rank, experts).permute(2, 0, 1), pairs)
        second = _mean_cosine(unit.reshape(-1, experts, rank).permute(1, 0, 2), pairs)
        by_rank, grouped = by_rank + first, grouped + second
        difference += (first - second) * len(b)
        variance += 2 * 2 * 2 / pairs
    if abs(difference) < _STANDARD_ERRORS * math.sqrt(variance):
        return None
    if max(by_rank, grouped) < _FACTOR * min(by_rank, grouped):
        return None
    if max(by_rank, grouped) > _COPIES * len(stacks):
        return None
    return _PEFT if by_rank > grouped else _GROUPED


def _mean_cosine(unit: Tensor, pairs: int) -> float:
    """Return the mean squared cosine of the columns of each matrix of `[experts, out, rank]`."""
    gram = torch.bmm(unit.mT, unit).square_()
    return float(gram.sum() - gram.diagonal(dim1=1, dim2=2).sum()) / pairs
