"""Which tensors the output has where mergekit's definition of an architecture does not fit the files.

Plan and merge ask here, of checkpoints whose tensors have common names (see `naming.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_monosoup.checkpoint.classes import (
    backbone_prefix,
    class_name,
    expected_names,
    is_language_model_of,
    is_tied,
    tied_names,
)
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.naming import weight_names
from mergekit_monosoup.errors import MissingTensorError

# What classes compute as they are made; older versions of transformers wrote it into the files.
_BUFFER = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias)|position_ids"
    r"|relative_position_index)$"
)
_HEAD = re.compile(
    r"^(lm_head|cls|score|classifier|qa_outputs|pooler|embed_out|pre_classifier|vocab_\w+|\w+_predictions)\."
)
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder|vocab_projector)\.weight$"
)
_INPUT = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
_SHOWN = 3


@dataclass(frozen=True)
class Weight:
    """One weight of an architecture."""

    name: str
    vocabulary_axis: int | None = None
    optional: bool = False
    aliases: tuple[str, ...] = ()
    tied_names: tuple[str, ...] = ()
    force_dtype: str | None = None


@dataclass(frozen=True)
class Layout:
    """The tensors of the output, in order.

    `owner` is the checkpoint whose class the output has; `notes` say what is kept, new or left out.
    """

    weights: tuple[Weight, ...]
    owner: Checkpoint
    notes: tuple[str, ...] = ()


@dataclass
class _Sorted:
    """The tensors that not all checkpoints have, by what becomes of them."""

    buffers: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)


def common_layout(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    axes: Mapping[str, int | None] | None = None,
    *,
    strict: bool = False,
) -> Layout | None:
    """Return the tensors of the output by the names in the files.

    Args:
        models: all checkpoints, the fine-tuned ones in the order of the recipe.
        base: one of them.
        axes: vocabulary axes by name, where they are known.
        strict: return nothing where the checkpoints differ in their tensors; only our own methods know
            what to do with a tensor that the base, or a fine-tuned checkpoint, lacks.

    Raises:
        MissingTensorError: a checkpoint lacks a tensor that its class needs.
    """
    tuned = [model for model in models if model is not base]
    first = tuned[0] if tuned else models[0]
    held = {model.name: set(weight_names(model)) for model in models}
    everywhere = set.intersection(*held.values())
    if all(names == everywhere for names in held.values()):
        return Layout(tuple(_weight(n, models, axes) for n in weight_names(first)), first)
    if strict or base is None:
        return None
    whole = is_language_model_of(first, base)
    fate = _Sorted()
    for name in weight_names(first):
        if name not in held[base.name]:
            _sort_new(name, base, first, fate)
    language = _language_prefix(first) if whole or "text_config" in base.config else ""
    for name in weight_names(base):
        if name not in held[first.name]:
            _sort_missing(name, base, first, fate, whole=whole, language=language)
    for model in tuned[1:]:
        lacking = [n for n in weight_names(first) if n not in held[model.name] and n in held[base.name]]
        _refuse([n for n in lacking if _is_expected(n, first) and not _BUFFER.search(n)], model)
    dropped = {*fate.buffers, *fate.left_out, *fate.tied}
    names = [*(n for n in weight_names(first) if n not in dropped), *fate.kept]
    weights = tuple(_weight(name, models, axes) for name in names)
    return Layout(weights, base if whole else first, tuple(_notes(fate, base, first)))


def vocabulary_axis(name: str) -> int | None:
    """Return the axis of tokens of an input or output embedding, by its usual names."""
    return 0 if _INPUT.search(name) or _OUTPUT.search(name) or name == "lm_head.bias" else None


def _weight(name: str, models: Sequence[Checkpoint], axes: Mapping[str, int | None] | None) -> Weight:
    axis = (axes or {}).get(name)
    if axis is None:
        axis = vocabulary_axis(name)
    optional = any(name not in model.tensors for model in models)
    tied: tuple[str, ...] = ()
    if optional and (_OUTPUT.search(name) or _INPUT.search(name)):
        lacking = [m for m in models if name not in m.tensors]
        tied = tuple(dict.fromkeys(t for m in lacking if (t := _tied_to(name, m)) is not None))
    return Weight(name, axis, optional, (), tied)


def _tied_to(name: str, model: Checkpoint) -> str | None:
    """Return the tensor that a checkpoint has in the place of an embedding or head that it does not store."""
    if not (_OUTPUT.search(name) or _INPUT.search(name)):
        return None
    # Encoder-decoders have one embedding under up to four names.
    known = tied_names(model, name)
    if known:
        return next((n for n in model.tensors if n in known), None)
    if not _OUTPUT.search(name) or not is_tied(model):
        return None
    return next((n for n, t in model.tensors.items() if _INPUT.search(n) and len(t.shape) == 2), None)


def _sort_new(name: str, base: Checkpoint, first: Checkpoint, fate: _Sorted) -> None:
    if _BUFFER.search(name):
        fate.buffers.append(name)
    elif _tied_to(name, base) is None:
        if class_name(base) == class_name(first) and _is_expected(name, base):
            _refuse([name], base, " (the base)")
        fate.new.append(name)


def _sort_missing(
    name: str, base: Checkpoint, first: Checkpoint, fate: _Sorted, *, whole: bool, language: str
) -> None:
    if _BUFFER.search(name):
        fate.buffers.append(name)
    elif _tied_to(name, first) is not None:
        fate.tied.append(name)
    elif language and not name.startswith(language) and not _HEAD.search(name):
        fate.kept.append(name)
    elif _is_expected(name, base if whole else first):
        _refuse([name], first)
    elif whole or (class_name(base) == class_name(first) and not _HEAD.search(name)):
        fate.kept.append(name)
    else:
        fate.left_out.append(name)


def _refuse(names: Sequence[str], model: Checkpoint, role: str = "") -> None:
    if names:
        raise MissingTensorError(
            f"tensor {names[0]} is missing in {model.name}{role}; use checkpoints of the same architecture"
        )


def _language_prefix(tuned: Checkpoint) -> str:
    """Return what all names but those of heads begin with; empty where they have no beginning in common."""
    names = [name.split(".") for name in weight_names(tuned) if not _HEAD.search(name)]
    common: list[str] = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join([*common, ""])


def _is_expected(name: str, model: Checkpoint) -> bool:
    """Say whether the class of a checkpoint has a tensor; where unknown, whether other layers have it."""
    from mergekit_monosoup.checkpoint.coverage import names_in_class

    expected = expected_names(model)
    if expected is None:
        pattern = re.compile(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)))
        return any(pattern.fullmatch(other) for other in model.tensors)
    candidates = names_in_class(name, model.config.get("model_type"))
    prefix = backbone_prefix(model)
    if prefix:
        candidates |= {f"{prefix}.{n}" for n in candidates} | {
            n.removeprefix(f"{prefix}.") for n in candidates
        }
    return bool(candidates & expected)


def _notes(fate: _Sorted, base: Checkpoint, first: Checkpoint) -> list[str]:
    notes = []
    if fate.buffers:
        notes.append(f"{_listed(fate.buffers)} left out: transformers computes what these hold")
    if fate.tied:
        notes.append(f"{_listed(fate.tied)} left out: {first.name} ties it to its embedding")
    if fate.new:
        notes.append(f"{_listed(fate.new)} kept as in {first.name}: the base does not have them")
    if fate.kept:
        notes.append(f"{_listed(fate.kept)} kept from the base: {first.name} does not have them")
    if fate.left_out:
        notes.append(f"{_listed(fate.left_out)} of the base left out: {first.name} has no such part")
    return notes


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
