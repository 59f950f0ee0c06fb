"""Which tensors an architecture has, by mergekit's own definitions.

mergekit describes architectures in JSON files. Reading them directly spares the import of transformers;
architectures without such a file are left to mergekit itself.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.classes import architecture_name
from mergekit_monosoup.checkpoint.documents import MOST_LAYERS, first_line
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.layout import Weight
from mergekit_monosoup.errors import InputError


class UnknownArchitectureError(InputError):
    """mergekit cannot tell the tensors of a model."""


_FIELD = re.compile(r"\$\{(layer_index|num_layers)([+-]1)?\}")


@dataclass(frozen=True)
class Module:
    """A part of a model with layers of its own."""

    layers: Callable[[Checkpoint], int]
    before: Callable[[Checkpoint], Sequence[Weight]]
    layer: Callable[[int, Checkpoint], Sequence[Weight]]
    after: Callable[[Checkpoint], Sequence[Weight]]


@dataclass(frozen=True)
class Architecture:
    """A model's modules, by mergekit's names for them."""

    name: str
    modules: Mapping[str, Module]


def json_architecture(checkpoint: Checkpoint) -> Architecture | None:
    """Return mergekit's definition of a checkpoint's architecture, None where it is not a JSON file."""
    name = architecture_name(checkpoint)
    candidates = [d for d in _definitions(name) if name in _names(d)]
    if len(candidates) > 1:
        model_type = checkpoint.config.get("model_type")
        candidates = [d for d in candidates if d.get("model_type") == model_type]
    if len(candidates) != 1:
        return None
    definition = candidates[0]
    if definition.get("kind", "module") == "module":
        return Architecture(name, {"default": _module(definition, "")})
    return Architecture(
        name,
        {
            key: _module(module["architecture"], module.get("weight_prefix") or "")
            for key, module in definition["modules"].items()
        },
    )


def _definitions(name: str) -> list[dict[str, Any]]:
    spec = importlib.util.find_spec("mergekit")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("mergekit is not installed; pip install 'mergekit>=0.1.5,<0.2'")
    folder = Path(spec.submodule_search_locations[0]) / "_data" / "architectures"
    texts = (file.read_text("utf-8") for file in sorted(folder.glob("*.json")))
    return [json.loads(text) for text in texts if f'"{name}"' in text]


def _names(definition: dict[str, Any]) -> list[str]:
    return list(definition.get("architectures") or [])


def _module(definition: dict[str, Any], prefix: str) -> Module:
    fixed = definition.get("override_num_layers")
    key = definition.get("num_layers_config_key") or "num_hidden_layers"

    def layers(checkpoint: Checkpoint) -> int:
        return int(fixed) if fixed is not None else _config_number(checkpoint, key)

    def weights(entries: Sequence[dict[str, Any]], checkpoint: Checkpoint, index: int | None) -> list[Weight]:
        count = layers(checkpoint)
        return [_weight(entry, prefix, count, index) for entry in entries]

    return Module(
        layers,
        lambda checkpoint: weights(definition["pre_weights"], checkpoint, None),
        lambda index, checkpoint: weights(definition["layer_templates"]["weights"], checkpoint, index),
        lambda checkpoint: weights(definition["post_weights"], checkpoint, None),
    )


def _config_number(checkpoint: Checkpoint, key: str) -> int:
    value: Any = checkpoint.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None and checkpoint.config.get("model_type"):
        # Some classes have other names for it (T5), or a default. Slow to import, and rarely needed.
        from transformers import AutoConfig

        try:
            value = AutoConfig.for_model(**checkpoint.config)
        except Exception as error:
            message = f"config.json of {checkpoint.name} cannot be read: {first_line(error)}"
            raise InputError(message) from error
        for part in key.split("."):
            value = getattr(value, part, None)
    if not isinstance(value, int):
        raise InputError(f"config.json of {checkpoint.name} does not say how many layers there are ({key})")
    if not 0 <= value <= MOST_LAYERS:
        raise InputError(f"config.json of {checkpoint.name} says that there are {value} layers ({key})")
    return value


def _weight(entry: Mapping[str, Any], prefix: str, layers: int, index: int | None) -> Weight:
    def filled(template: str) -> str:
        def value(match: re.Match[str]) -> str:
            number = layers if match[1] == "num_layers" else index
            if number is None:
                raise InputError(f"mergekit's definition uses layer_index outside a layer: {template}")
            return str(number + int(match[2] or 0))

        return prefix + _FIELD.sub(value, template)

    return Weight(
        filled(entry["name"]),
        entry.get("vocabulary_axis"),
        bool(entry.get("optional", False)),
        tuple(map(filled, entry.get("aliases") or ())),
        tuple(map(filled, entry.get("tied_names") or ())),
        entry.get("force_dtype"),
    )


def inferred_architecture(models: Sequence[Checkpoint], base: Checkpoint | None) -> Architecture:
    """Ask mergekit for the architecture of local checkpoints that no JSON file describes.

    Raises:
        UnknownArchitectureError: mergekit cannot tell.
    """
    from mergekit.architecture import arch_info_for_config
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.common import ModelPath, ModelReference
    from mergekit.options import MergeOptions

    references = {m.name: ModelReference(model=ModelPath(path=str(m.folder))) for m in models}
    try:
        configs = {m.name: references[m.name].config() for m in models}
        info = arch_info_for_config(configs[models[0].name])
        if info is None:
            info = infer_architecture_info(
                tuple(references.values()), references[base.name] if base else None, MergeOptions()
            )
    except Exception as error:
        raise UnknownArchitectureError(
            f"mergekit cannot tell the tensors of {models[0].name}: {first_line(error)}"
        ) from error
    modules = {}
    for key, definition in info.modules.items():
        modules[key] = _asked_module(definition.architecture, definition.weight_prefix or "", configs)
    return Architecture(architecture_name(models[0]), modules)


def _asked_module(definition: Any, prefix: str, configs: Mapping[str, Any]) -> Module:
    def weights(found: Any) -> list[Weight]:
        return [
            Weight(
                prefix + w.name,
                w.vocabulary_axis,
                w.optional,
                tuple(prefix + a for a in w.aliases or ()),
                tuple(prefix + t for t in w.tied_names or ()),
                w.force_dtype,
            )
            for w in found or ()
        ]

    return Module(
        lambda checkpoint: int(definition.num_layers(configs[checkpoint.name])),
        lambda checkpoint: weights(definition.pre_weights(configs[checkpoint.name])),
        lambda index, checkpoint: weights(definition.layer_weights(index, configs[checkpoint.name])),
        lambda checkpoint: weights(definition.post_weights(configs[checkpoint.name])),
    )
