"""What transformers knows of a checkpoint's class; asked only where the files leave a question open."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.errors import InputError


def class_name(checkpoint: Checkpoint) -> str:
    """Return the one class that config.json names, an empty string where there is none or several."""
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and len(names) == 1 else ""


def architecture_name(checkpoint: Checkpoint) -> str:
    """Return the model class that config.json names.

    Raises:
        InputError: none, or several.
    """
    names = checkpoint.config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise InputError(
            f"config.json of {checkpoint.name} names {names or 'no class'} under architectures; mergekit "
            "needs exactly one, such as the class that the checkpoint was saved from"
        )
    return str(names[0])


def text_type(config: Mapping[str, Any]) -> str | None:
    """Return the model type of the language model within a configuration."""
    inner = config.get("text_config")
    return (inner.get("model_type") if isinstance(inner, Mapping) else None) or config.get("model_type")


def are_kin(one: Checkpoint, other: Checkpoint) -> bool:
    """Say whether two checkpoints differ in heads alone, or one is the language model of the other."""
    if class_name(one) == class_name(other):
        return True
    types = [{c.config.get("model_type"), text_type(c.config)} - {None} for c in (one, other)]
    return bool(types[0] & types[1])


def is_language_model_of(tuned: Checkpoint, base: Checkpoint) -> bool:
    """Say whether a checkpoint is the language model alone of one that has further parts."""
    composite = isinstance(base.config.get("text_config"), Mapping)
    alone = not isinstance(tuned.config.get("text_config"), Mapping)
    return composite and alone and text_type(base.config) == tuned.config.get("model_type")


def is_tied(checkpoint: Checkpoint) -> bool:
    """Say whether config.json, or the default of its class, ties the output to the input embedding."""
    config = checkpoint.config
    inner = config.get("text_config")
    said = [c.get("tie_word_embeddings") for c in (config, inner if isinstance(inner, Mapping) else {})]
    known = next((value for value in said if value is not None), None)
    if known is None:
        known = getattr(_settings(checkpoint), "tie_word_embeddings", True)
    return bool(known)


def backbone_prefix(checkpoint: Checkpoint) -> str | None:
    """Return the name under which a class with a head holds the model without it."""
    import transformers

    prefix = getattr(getattr(transformers, class_name(checkpoint), None), "base_model_prefix", None)
    return prefix or None


def expected_names(checkpoint: Checkpoint) -> frozenset[str] | None:
    """Return the names in the state dict of a checkpoint's class; None for classes of custom code."""
    # By identity of the configuration: it is read once, and building the class takes a second at most.
    built = _built(_Held(checkpoint))
    return None if built is None else built[0]


def tied_names(checkpoint: Checkpoint, name: str) -> frozenset[str]:
    """Return the names under which the class of a checkpoint has the same parameter; none where unknown.

    Names are those of the class, or without the prefix of its backbone.
    """
    built = _built(_Held(checkpoint))
    if built is None:
        return frozenset()
    prefix = f"{backbone_prefix(checkpoint) or ''}."
    for known in (name, prefix + name):
        if known in built[1]:
            others = built[1][known] - {known}
            return frozenset(others | {other.removeprefix(prefix) for other in others})
    return frozenset()


class _Held:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __hash__(self) -> int:
        return id(self.checkpoint.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.checkpoint.config is self.checkpoint.config


@lru_cache(8)
def _built(held: _Held) -> tuple[frozenset[str], dict[str, frozenset[str]]] | None:
    """Return the names of a class, and of those that are one parameter the others."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name(held.checkpoint), None)
    settings = _settings(held.checkpoint)
    if model_class is None or settings is None:
        return None
    try:
        with torch.device("meta"):
            model = model_class(settings)
            model.tie_weights()
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    tied = {name: frozenset(names) for names in groups.values() if len(names) > 1 for name in names}
    return frozenset(model.state_dict()), tied


def _settings(checkpoint: Checkpoint) -> Any:
    from transformers import CONFIG_MAPPING

    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(checkpoint.config))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
