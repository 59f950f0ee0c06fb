"""What a configuration says of single layers, after `slices` have cut, repeated or moved them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# One entry a layer: texts and mappings under these names, numbers only where the name says so.
_OF_LAYERS = re.compile("layer|block|pattern|attention_types")
_NUMBERS_A_LAYER = frozenset({
    "activation_sparsity_pattern", "ffn_multipliers", "intermediate_size", "no_rope_layers",
    "num_attention_heads", "num_key_value_heads", "num_kv_heads", "num_query_heads",
})  # fmt: skip
_INDICES = re.compile(r"(layers|layer_ids|layers_ids|layer_idxs?|layer_indices|attn_idxs)$")
# Counted from one, or of pairs of layers: not renumbered here.
_OTHERWISE = frozenset({"deepstack_layer_map", "kv_source_layers", "ple_layer_ids"})
_LEADING = frozenset({"first_k_dense_replace", "num_dense_layers", "n_dense_first_layers"})
_TRAILING = frozenset({"num_kv_shared_layers"})
_PERIOD = re.compile(
    "(layer_period|sparse_step|moe_layer_step|layer_interval|layer_freq|sliding_window_pattern|"
    "full_attention_interval|every_n_layers|cross_layer_interval)$"
)

_COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers",
)  # fmt: skip
_OF_OTHER_SENSES = re.compile("vision|visual|image|audio")


def layers_key(config: Mapping[str, Any], module: str, count: int | None = None) -> str | None:
    """Return the key of a configuration that counts the layers of a module, None where there is none.

    Args:
        config: config.json.
        module: the prefix of the module's tensors, such as `model` or `vision_tower`.
        count: its number of layers, where it is known.
    """
    wanted = bool(_OF_OTHER_SENSES.search(module))
    found = [path for path, value in _counts(config, "") if count is None or value == count]
    found = [path for path in found if bool(_OF_OTHER_SENSES.search(path)) == wanted]
    side, other = ("decoder", "encoder") if "decoder" in module else ("encoder", "decoder")
    named = [path for path in found if side in path] if side in module else []
    return next(iter([*named, *(path for path in found if other not in path), *found]), None)


def _counts(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, int]]:
    for key in _COUNTS:
        if type(config.get(key)) is int:
            yield f"{path}{key}", config[key]
    for key, part in config.items():
        if key.endswith("_config") and isinstance(part, dict):
            yield from _counts(part, f"{path}{key}.")


def renumber_layers(part: dict[str, Any], before: int, sources: Sequence[int]) -> list[str]:
    """Put right, in place, what a part of a configuration says of its layers.

    Lists with one entry a layer (`layer_types`, `no_rope_layers`) are cut and repeated; lists of layers by
    their number (`mlp_only_layers`) are renumbered; numbers of leading layers (`first_k_dense_replace`) are
    counted anew.

    Args:
        part: of config.json, its number of layers already the new one.
        before: the number of layers of the checkpoint.
        sources: from which of them each layer of the result is.

    Returns:
        The keys that are no longer true and cannot be put right.
    """
    if list(sources) == list(range(before)):
        return []
    untrue = []
    for name, value in part.items():
        if name in _OTHERWISE and value:
            untrue.append(name)
        elif _is_each(name, value, before):
            chosen = [value[source] for source in sources]
            part[name] = "".join(chosen) if isinstance(value, str) else chosen
        elif _is_indices(name, value, before):
            part[name] = [index for index, source in enumerate(sources) if source in value]
        elif type(value) is not int or value <= 0:
            continue
        elif name in _LEADING:
            kept = sum(source < value for source in sources)
            if any(source >= value for source in sources[:kept]):
                untrue.append(name)
            part[name] = kept
        elif name in _TRAILING:
            kept = sum(source >= before - value for source in sources)
            if any(source < before - value for source in sources[len(sources) - kept :]):
                untrue.append(name)
            part[name] = kept
        elif (
            _PERIOD.search(name)
            and value > 1
            and any((source - index) % value for index, source in enumerate(sources))
            and not _is_spelled_out(name, part)
        ):
            untrue.append(name)
    return untrue


def _is_each(name: str, value: Any, before: int) -> bool:
    """Say whether a value has one entry a layer."""
    if not isinstance(value, (list, str)) or len(value) != before:
        return False
    if isinstance(value, str):
        return name.endswith("_pattern")
    if name in _NUMBERS_A_LAYER:
        return True
    return bool(_OF_LAYERS.search(name)) and all(
        entry is None or isinstance(entry, (str, bool, dict, float)) for entry in value
    )


def _is_indices(name: str, value: Any, before: int) -> bool:
    """Say whether a value names layers by their number."""
    return (
        isinstance(value, list)
        and bool(_INDICES.search(name))
        and all(type(entry) is int and 0 <= entry < before for entry in value)
        and len(set(value)) == len(value)
    )


def _is_spelled_out(name: str, part: dict[str, Any]) -> bool:
    """Say whether a list of every layer, which goes before the rule, stands beside it."""
    lists = {
        "no_rope_layer_interval": "no_rope_layers",
        "interleave_moe_layer_step": "moe_layers",
        "sliding_window_pattern": "layer_types",
        "full_attention_interval": "layer_types",
        "global_attn_every_n_layers": "layer_types",
    }
    return bool(part.get(lists.get(name.removeprefix("_"), "")))
