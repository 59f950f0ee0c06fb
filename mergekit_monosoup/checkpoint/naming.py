"""Tensors by their names in the files, where mergekit's definition of an architecture does not fit.

The merge does the same (see `merging/architecture.py`); what is slow to import is imported only for
checkpoints that need it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.scales import is_scale
from mergekit_monosoup.planning.architecture import Weight

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a checkpoint's tensors, scales of float8 weights left out."""
    return [name for name in checkpoint.tensors if not is_scale(name, checkpoint.tensors)]


def shared_names(checkpoints: Sequence[Checkpoint]) -> list[tuple[str, ...]] | None:
    """Return for each tensor its name in each checkpoint, or None where they hold different tensors."""
    names = [weight_names(checkpoint) for checkpoint in checkpoints]
    if all(set(other) == set(names[0]) for other in names[1:]):
        return [(name,) * len(names) for name in names[0]]
    from mergekit_monosoup.checkpoint.coverage import canonical_names

    maps = [
        canonical_names(held, checkpoint.config.get("model_type"))
        for held, checkpoint in zip(names, checkpoints, strict=True)
    ]
    if any(set(other) != set(maps[0]) for other in maps[1:]):
        return None
    return [tuple(held[name] for held in maps) for name in maps[0]]


def gradient_positions(names: Sequence[str]) -> dict[str, float]:
    """Return where each tensor lies along gradients: from 0 to 1 over each run of numbered parts."""
    found = {name: match for name in names if (match := _LAYER.match(name))}
    layers: dict[str, set[int]] = {}
    for match in found.values():
        layers.setdefault(match[1], set()).add(int(match[2]))
    positions = dict.fromkeys(names, 0.0)
    for name, match in found.items():
        numbers = sorted(layers[match[1]])
        last = len(numbers) - 1
        positions[name] = numbers.index(int(match[2])) / last if last else 1.0
    return positions


def misfit(asked: Mapping[str, Sequence[Weight]], models: Sequence[Checkpoint], label: str) -> str | None:
    """Return what mergekit's definition asks for in vain or leaves out, None where it fits.

    Args:
        asked: the weights of the definition, by checkpoint.
        models: the checkpoints.
        label: what messages call the architecture.
    """
    from mergekit_monosoup.checkpoint.coverage import check_coverage, describe

    lost = None
    for checkpoint in models:
        found = check_coverage(
            cast("Any", asked.get(checkpoint.name, ())),
            checkpoint.tensors,
            checkpoint.config.get("model_type"),
        )
        if found.absent:
            return (
                f"mergekit's definition of {label} asks for {describe(found.absent)}, not in "
                f"{checkpoint.name}"
            )
        if found.lost and lost is None:
            lost = f"mergekit's definition of {label} leaves out {describe(found.lost)} of {checkpoint.name}"
    return lost
