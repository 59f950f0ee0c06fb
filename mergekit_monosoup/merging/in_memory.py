"""The tensors of a merge without a file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup import host
from mergekit_monosoup.merging.adapters import MERGED_ADAPTERS, adapters_opened
from mergekit_monosoup.merging.local import run_units
from mergekit_monosoup.merging.opened import model_types
from mergekit_monosoup.merging.prepared import Prepared
from mergekit_monosoup.merging.units import by_input
from mergekit_monosoup.spectral.parts import PartsStore


def merge_in_memory(
    recipe: dict[str, Any],
    options: MergeOptions,
    take: Callable[[str, Tensor], None],
    work: Path,
    parts: PartsStore | None = None,
) -> None:
    """Hand the tensors of a recipe to `take`, as they would be stored, one after the other.

    Args:
        recipe: in mergekit's form, already planned once without errors.
        options: mergekit's own.
        take: called with name and tensor, from one thread at a time.
        work: for copies of adapters that only a merged copy can read.
        parts: keeps the parts of updates from merge to merge.

    Raises:
        InputError: the checkpoints do not go together.
    """
    config = MergeConfiguration.model_validate(recipe)
    with ExitStack() as opened:
        opened.enter_context(adapters_opened(config, options, work / MERGED_ADAPTERS))
        host.open_models(config.referenced_models(), options)
        types = model_types(config.referenced_models(), options)
        opened.enter_context(host.plain_configurations(types))
        prepared = Prepared.of(config, options, [], parts)
        units = by_input(prepared.units.units)
        run_units(prepared.units, units, options, lambda unit, tensor: take(unit.name, tensor))
        prepared.merge.close()
