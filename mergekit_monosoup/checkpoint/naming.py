"""One name for one tensor: what wraps, prefixes or renames the tensors of a checkpoint is seen through.

Names are the same for plan and merge; what is slow to import is imported only for checkpoints that need it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_monosoup.checkpoint.classes import (
    backbone_prefix,
    class_name,
    expected_names,
    is_language_model_of,
)
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.scales import is_scale
from mergekit_monosoup.errors import InputError

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_NUMBER = re.compile(r"\.\d+(?=\.)")
# torch.compile, FSDP and activation checkpointing put these before any module that they wrap.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# DataParallel and peft put these before the whole model.
_AROUND = ("module.", "base_model.model.")
_PARTS = frozenset({"model", "language_model", "text_model"})
_DEEPEST = 3


@dataclass(frozen=True)
class Renamed:
    """A checkpoint under the names that all checkpoints of a merge share.

    `stored` maps these names to those in the files where they differ.
    """

    checkpoint: Checkpoint
    stored: Mapping[str, str]


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a checkpoint's tensors, scales of float8 weights left out."""
    return [name for name in checkpoint.tensors if not is_scale(name, checkpoint.tensors)]


def with_common_names(
    models: Sequence[Checkpoint], base: Checkpoint | None
) -> tuple[list[Renamed], list[str]]:
    """Name the tensors of all checkpoints alike, as the class of the output does.

    Args:
        models: in the order of the recipe.
        base: one of them.

    Returns:
        The checkpoints, and one line for each of them whose names had to be seen through.

    Raises:
        InputError: the names differ by prefixes that nobody knows.
    """
    notes: list[str] = []
    bare = [_unwrapped(model, notes) for model in models]
    known = [model for model in bare if model.checkpoint.tensors]
    if all(set(m.checkpoint.tensors) == set(known[0].checkpoint.tensors) for m in known[1:]):
        return bare, notes
    positions = [i for i, model in enumerate(bare) if model.checkpoint.tensors]
    root = next((i for i in positions if models[i] is base), positions[0])
    first = next((i for i in positions if i != root), root)
    reference = _reference(bare[root].checkpoint, bare[first].checkpoint)
    target = bare[root if reference else first].checkpoint
    for i in positions:
        if bare[i].checkpoint is not target:
            bare[i] = _aligned(bare[i], target, notes)
    return bare, notes


def _unwrapped(model: Checkpoint, notes: list[str]) -> Renamed:
    names = {name: _WRAPPED.sub("", name) for name in model.tensors}
    seen = {match[0] for name in model.tensors for match in [_WRAPPED.search(name)] if match}
    while names:
        around = next((p for p in _AROUND if all(name.startswith(p) for name in names.values())), None)
        if around is None:
            break
        seen.add(around)
        names = {name: bare.removeprefix(around) for name, bare in names.items()}
    if not seen or len(set(names.values())) < len(names):
        return Renamed(model, {})
    listed = " and ".join(f"`{part}`" for part in sorted(seen))
    notes.append(f"the names in the files of {model.name} hold {listed}, which is seen through")
    return _renamed(Renamed(model, {}), names)


def _renamed(model: Renamed, names: Mapping[str, str]) -> Renamed:
    """Return a checkpoint with new names; `names` maps those that it has to those that it gets."""
    tensors = {
        (new := names.get(old, old)): replace(tensor, name=new, stored=tensor.stored or old)
        for old, tensor in model.checkpoint.tensors.items()
    }
    stored = {names.get(old, old): model.stored.get(old, old) for old in model.checkpoint.tensors}
    other = {n: s for n, s in stored.items() if n != s}
    return Renamed(replace(model.checkpoint, tensors=tensors, renamed=bool(other)), other)


def _reference(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Say whether the output takes its names from the base."""
    if class_name(base) != class_name(tuned):
        return is_language_model_of(tuned, base)
    if 2 * len(set(base.tensors) & set(tuned.tensors)) >= min(len(base.tensors), len(tuned.tensors)):
        return True
    expected = expected_names(base) or frozenset()
    return len(expected & set(base.tensors)) >= len(expected & set(tuned.tensors))


def _aligned(model: Renamed, target: Checkpoint, notes: list[str]) -> Renamed:
    """Name a checkpoint's tensors as `target` does."""
    left = [name for name in weight_names(model.checkpoint) if name not in target.tensors]
    free = [name for name in weight_names(target) if name not in model.checkpoint.tensors]
    if not left or not free:
        return model
    names = _by_transformers(model.checkpoint, target, left, free)
    how = f"the form of another version of transformers than those of {target.name}" if names else ""
    left = [name for name in left if name not in names]
    taken = set(names.values())
    pair = _prefixes(left, [name for name in free if name not in taken])
    if pair is not None:
        by_prefix = _by_prefix(model.checkpoint, target, left, pair)
        names |= by_prefix
        if by_prefix:
            how = how or f"{_written(pair[0])} where those of {target.name} have {_written(pair[1])}"
    if how:
        notes.append(f"the names of {model.checkpoint.name} have {how}, which is seen through")
    return _with_scales(model, names) if names else model


def _by_prefix(
    model: Checkpoint, target: Checkpoint, left: Sequence[str], pair: tuple[str, str, int]
) -> dict[str, str]:
    """Return new names for tensors that have one prefix where those of `target` have another."""
    mine, theirs, count = pair
    names = _replaced(left, target, mine, theirs)
    if _is_known(mine, model, target) and _is_known(theirs, model, target):
        return names if 2 * count >= len(left) else {}
    if 2 * count < min(len(weight_names(model)), len(weight_names(target))):
        return {}
    example, other = next(iter(names.items()))
    raise InputError(
        f"the names of {model.name} begin with {_written(mine)} where those of {target.name} begin with "
        f"{_written(theirs)} ({example} and {other}); save one of them again under the names of the other"
    )


def _written(prefix: str) -> str:
    return f"`{prefix}`" if prefix else "no prefix"


def _by_transformers(
    model: Checkpoint, target: Checkpoint, left: Sequence[str], free: Sequence[str]
) -> dict[str, str]:
    from mergekit_monosoup.checkpoint.coverage import canonical_names

    canonical = canonical_names(free, target.config.get("model_type"))
    own = canonical_names(left, model.config.get("model_type"))
    return {name: canonical[new] for new, name in own.items() if new in canonical and new not in left}


def _prefixes(left: Iterable[str], free: Iterable[str]) -> tuple[str, str, int] | None:
    """Return the pair of prefixes by which most names differ, and how many do."""
    ends: dict[str, str] = {}
    for depth in range(_DEEPEST + 1):
        for name in free:
            parts = name.split(".")
            if len(parts) > depth + 1:
                ends.setdefault(".".join(parts[depth:]), ".".join(parts[:depth]))
    found: Counter[tuple[str, str]] = Counter()
    for name in left:
        parts = name.split(".")
        for depth in range(min(_DEEPEST, len(parts) - 2) + 1):
            end = ".".join(parts[depth:])
            if end in ends:
                found[".".join(parts[:depth]), ends[end]] += 1
                break
    if not found:
        return None
    ((mine, theirs), count) = found.most_common(1)[0]
    return (mine and mine + "."), (theirs and theirs + "."), count


def _replaced(left: Sequence[str], target: Checkpoint, mine: str, theirs: str) -> dict[str, str]:
    """Return the new names of those tensors whose like `target` has, be it in another layer."""
    kinds = {_NUMBER.sub(".*", name) for name in target.tensors}
    names = {name: theirs + name.removeprefix(mine) for name in left if name.startswith(mine)}
    return {name: new for name, new in names.items() if _NUMBER.sub(".*", new) in kinds}


def _is_known(prefix: str, *models: Checkpoint) -> bool:
    known = _PARTS | {part for model in models if (part := backbone_prefix(model))}
    return all(part in known for part in prefix.rstrip(".").split(".") if part)


def _with_scales(model: Renamed, names: dict[str, str]) -> Renamed:
    """Rename the scales of float8 weights with them."""
    tensors = model.checkpoint.tensors
    for name in tensors:
        stem = name.rpartition("_scale")[0]
        if name not in names and is_scale(name, tensors) and stem in names:
            names[name] = names[stem] + name.removeprefix(stem)
    return _renamed(model, names)


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
