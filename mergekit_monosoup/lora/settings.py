"""adapter_config.json of an edited adapter: the old one, changed only where it must be."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_monosoup.errors import AdapterError
from mergekit_monosoup.lora.adapter import AdaptedModule, Adapter, parameter_names, plain_name

_TARGETS = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")


def settings_for(
    adapters: Sequence[Adapter], ranks: Mapping[str, tuple[AdaptedModule, int]]
) -> dict[str, Any]:
    """Return the settings under which peft loads factors of these ranks with the same scaling.

    Args:
        adapters: the inputs; the settings of the first are the start.
        ranks: for each module, what it was, with its scaling, and the new rank.

    Raises:
        AdapterError: adapters with different `target_parameters` cannot be expressed as one.
    """
    first = adapters[0]
    settings = copy.deepcopy(first.settings)
    if len(adapters) > 1:
        _unite_targets(adapters, list(ranks), settings)
    old = {m.module: (m.rank, m.scaling) for m in first.modules}
    if {n: (rank, m.scaling) for n, (m, rank) in ranks.items()} == old:
        return settings
    rslora = bool(first.config.use_rslora)
    wanted = {
        name: (rank, _plain_number(module.scaling * (math.sqrt(rank) if rslora else rank)))
        for name, (module, rank) in ranks.items()
    }
    (rank, alpha), _ = Counter(wanted.values()).most_common(1)[0]
    settings |= {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    for name, (its_rank, its_alpha) in wanted.items():
        for pattern in _pattern_names(first, name, ranks[name][0]):
            if its_rank != rank:
                settings["rank_pattern"][pattern] = its_rank
            if its_alpha != alpha:
                settings["alpha_pattern"][pattern] = its_alpha
    return settings


def _plain_number(value: float) -> int | float:
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value


def _pattern_names(adapter: Adapter, name: str, module: AdaptedModule) -> list[str]:
    if module.experts > 1 or plain_name(name) != name:
        return parameter_names(adapter.config, name, anywhere=True)
    return parameter_names(adapter.config, name) or [name]


def _unite_targets(adapters: Sequence[Adapter], names: list[str], settings: dict[str, Any]) -> None:
    parameters = [set(a.config.target_parameters or ()) for a in adapters]
    if any(p != parameters[0] for p in parameters):
        raise AdapterError(
            "the adapters differ in target_parameters, which peft cannot load as one adapter; average them "
            "as `base+adapter` inputs of a recipe"
        )
    settings["bias"] = next((a.config.bias for a in adapters if a.config.bias != "none"), "none")
    saved = [set(a.config.modules_to_save or ()) for a in adapters]
    if union := sorted(set().union(*saved)):
        settings["modules_to_save"] = union
    if all({m.module for m in a.modules} == set(names) for a in adapters):
        return
    plain = [n for n in names if plain_name(n) == n and not parameter_names(adapters[0].config, n)]
    settings |= dict.fromkeys(_TARGETS) | {"target_modules": plain}
