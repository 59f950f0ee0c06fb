"""How the factors of stacked experts are packed: two ways that no shape tells apart.

peft stores B of a stack as `[out, rank * experts]` with the expert running fastest (`rank_major`). Unsloth
trained it expert by expert (`grouped_by_expert`) until September 2026, and has marked both since then by
`lora_B_layout` in adapter_config.json.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_monosoup.errors import AdapterError
from mergekit_monosoup.lora.said import warn_once

if TYPE_CHECKING:
    from mergekit_monosoup.lora.adapter import AdaptedModule

LOG = logging.getLogger(__name__)

MARKER = "lora_B_layout"
_PEFT, _GROUPED = "rank_major", "grouped_by_expert"
_DETAILS = "unsloth_fused_expert_lora"


def with_peft_layout(
    source: str,
    folder: Path,
    settings: dict[str, Any],
    tensors: Mapping[str, Tensor],
    modules: Sequence[AdaptedModule],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors with every stack packed as peft packs it, and settings that say so.

    Args:
        source, folder: of the adapter.
        settings: its adapter_config.json.
        tensors: as they are stored.
        modules: its pairs of factors.

    Raises:
        AdapterError: the marker has a value that is not known.
    """
    stacks = [module for module in modules if module.experts > 1]
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
        if _by_unsloth(folder, settings):
            warn_once(
                LOG,
                "adapter %s: trained by Unsloth and without %s; its stacked experts are read as peft packs "
                'them. If it was trained before September 2026, add "%s": "%s" to its adapter_config.json',
                source,
                MARKER,
                MARKER,
                _GROUPED,
            )
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


def _by_unsloth(folder: Path, settings: Mapping[str, Any]) -> bool:
    card = folder / "README.md"
    text = str(dict(settings)) + (card.read_text("utf-8", "replace") if card.is_file() else "")
    return "unsloth" in text.lower()
