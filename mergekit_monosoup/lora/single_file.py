"""A LoRA in one `.safetensors` file, as diffusers, kohya's scripts and OneTrainer write it.

Only the header and the alphas are read; factors are read module by module, when they are asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from mergekit_monosoup.checkpoint.adapter_folder import CONFIG, WEIGHTS
from mergekit_monosoup.checkpoint.headers import StoredTensor, read_safetensors_header
from mergekit_monosoup.errors import AdapterError, NonFiniteError, ShapeMismatchError, UnsupportedAdapterError
from mergekit_monosoup.lora.factors import LowRankUpdate
from mergekit_monosoup.lora.spellings import Family, Part, Spelled, spelled

# Where diffusers keeps the settings of an adapter: JSON of `unet.r`, `unet.lora_alpha`, ...
SETTINGS = "lora_adapter_metadata"
_FACTOR_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class FilePair:
    """One pair of factors: its keys, its rank and the scaling c of dW = c B A.

    `mid` is the core of a Tucker decomposition (`[r, r, k...]`) and `alpha` the key of the module's
    alpha; each None where the file has none.
    """

    module: str
    down: str
    up: str
    mid: str | None
    alpha: str | None
    rank: int
    scaling: float

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the module that an edit may write."""
        return tuple(k for k in (self.down, self.up, self.mid, self.alpha) if k is not None)


@dataclass(frozen=True)
class SingleFile:
    """A file whose every name and shape has been checked.

    `kept` are the keys that are no factors of a plain LoRA, in the order of the file, and what they belong
    to (empty: nobody knows).
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    settings: Mapping[str, Any]
    pairs: Mapping[str, FilePair]
    kept: Mapping[str, str]

    def read(self, *keys: str) -> list[Tensor]:
        """Return tensors, each mapped from the file."""
        with safe_open(self.path, "pt") as file:
            return [file.get_tensor(key) for key in keys]

    def update(self, pair: FilePair) -> LowRankUpdate:
        """Return dW as one matrix `[out, in * k * ...]`, c outside the factors.

        With a Tucker core, dW = B (core x A): the core belongs to the right factor, which an edit leaves
        alone.

        Raises:
            SafetensorError: the file has changed since its header was read.
        """
        down, up, *mid = self.read(*(k for k in (pair.down, pair.up, pair.mid) if k is not None))
        left = up.reshape(up.shape[0], -1)
        right = down.reshape(down.shape[0], -1)
        if mid:
            core = mid[0].double().flatten(2)
            right = (core.permute(0, 2, 1) @ right.double()).mT.reshape(core.shape[0], -1).float()
        shape = (left.shape[0], right.shape[1])
        return LowRankUpdate(left[None], right[None], pair.scaling, shape)


def read_single_file(path: Path, *, strict: bool = False) -> SingleFile:
    """Read the header of a LoRA file and pair its factors.

    Args:
        path: the file.
        strict: refuse what is not plain LoRA instead of leaving it as it is.

    Raises:
        AdapterError: no file, no safetensors, no LoRA, a factor without its partner, or spellings of two
            trades in one file.
        InputError: a damaged header.
        ShapeMismatchError: factors that do not multiply.
        UnsupportedAdapterError: nothing in it is plain LoRA, or `strict` and something is not.
    """
    _refuse_others(path)
    tensors = read_safetensors_header(path)
    names = {key: spelled(key) for key in tensors}
    _refuse_mixed(path, names)
    foreign = {s.module: s.kind for s in names.values() if s.kind in ("DoRA", "LoHa", "LoKr", "OFT", "GLoRA")}
    parts: dict[str, dict[Part, tuple[str, Spelled]]] = defaultdict(dict)
    for key, found in names.items():
        if found.part == "other" or found.module in foreign:
            continue
        if found.part in parts[found.module]:
            first = parts[found.module][found.part][0]
            raise AdapterError(f"{path}: {first} and {key} are one factor of one module; keep one of them")
        parts[found.module][found.part] = (key, found)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    settings = _settings(path, metadata)
    file = SingleFile(path, tensors, metadata, settings, {}, {})
    pairs = {
        module: _pair(file, module, {part: key for part, (key, _) in held.items()})
        for module, held in parts.items()
        if held.keys() - {"alpha"}
    }
    used = {key for pair in pairs.values() for key in pair.keys}
    kept = {k: foreign.get(s.module, s.kind) for k, s in names.items() if k not in used}
    if not pairs:
        kinds = sorted(set(foreign.values()))
        if kinds:
            raise UnsupportedAdapterError(
                f"{path} is {' and '.join(kinds)}, whose updates are no products of two factors; merge it "
                "into its base model and edit the merged model"
            )
        raise AdapterError(f"{path} holds no LoRA factors; is it a LoRA, and not a whole model?")
    if strict and kept:
        key, kind = next(iter(kept.items()))
        raise UnsupportedAdapterError(
            f"{path}: {key} is not plain LoRA{f' but {kind}' if kind else ''}; leave --strict out to keep "
            "such tensors as they are"
        )
    return SingleFile(path, tensors, metadata, settings, pairs, kept)


def _refuse_others(path: Path) -> None:
    if not path.is_file():
        raise AdapterError(f"{path} is not a file; name a .safetensors file, or the folder of a PEFT adapter")
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} is no .safetensors file; others can run code when they are read: save it as safetensors"
        )
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        raise AdapterError(f"{path} is part of a PEFT adapter; name its folder, {path.parent}")


def _refuse_mixed(path: Path, names: Mapping[str, Spelled]) -> None:
    first: dict[Family, str] = {}
    for key, found in names.items():
        if found.ends is not None and found.family is not None:
            first.setdefault(found.family, key)
    if len(first) > 1:
        raise AdapterError(
            f"{path} mixes the names of two trades ({' and '.join(first.values())}), and no program loads "
            "both; split it into two files"
        )


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if SETTINGS not in metadata:
        return {}
    try:
        settings = json.loads(metadata[SETTINGS])
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path}: {SETTINGS} of its header is no JSON ({error}); download it again"
        ) from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{path}: {SETTINGS} of its header is no mapping; download it again")
    return settings


def _pair(file: SingleFile, module: str, keys: Mapping[Part, str]) -> FilePair:
    path, tensors = file.path, file.tensors
    both: tuple[tuple[Part, Part], ...] = (("down", "up"), ("up", "down"))
    for part, other in both:
        if part not in keys:
            present = keys.get(other, next(iter(keys.values())))
            raise AdapterError(f"{path}: {present} has no factor '{part}' beside it; the file is incomplete")
    down, up = tensors[keys["down"]], tensors[keys["up"]]
    mid = tensors[keys["mid"]] if "mid" in keys else None
    for stored in (down, up, *([mid] if mid else [])):
        if stored.size == 0:
            raise AdapterError(f"{path}: {stored.name} is empty (shape {list(stored.shape)})")
        if stored.dtype not in _FACTOR_DTYPES:
            raise AdapterError(
                f"{path}: {stored.name} is stored as {stored.dtype}; convert the file to float16 first"
            )
    rank = down.shape[0]
    inner = mid.shape if mid else (rank, rank)
    multiply = len(down.shape) >= 2 and len(up.shape) >= 2 and math.prod(up.shape[2:]) == 1
    if mid is not None:
        multiply = multiply and len(mid.shape) >= 3 and math.prod(down.shape[2:]) == 1
    if not multiply or (up.shape[1], rank) != tuple(inner[:2]):
        shapes = ", ".join(f"{s.name} {list(s.shape)}" for s in (up, mid, down) if s)
        raise ShapeMismatchError(f"{path}: {shapes} do not multiply; those of grouped convolutions never do")
    if "alpha" in keys:
        scaling = _alpha(file, keys["alpha"]) / rank
    else:
        _check_rank(file, module, rank)
        scaling = configured_scaling(file, module, rank)
    return FilePair(module, keys["down"], keys["up"], keys.get("mid"), keys.get("alpha"), rank, scaling)


def _alpha(file: SingleFile, key: str) -> float:
    if file.tensors[key].size != 1:
        raise AdapterError(f"{file.path}: {key} is no single number; the file is damaged")
    alpha = float(file.read(key)[0])
    if not math.isfinite(alpha):
        raise NonFiniteError(f"{file.path}: {key} is {alpha}; the file is damaged, or training diverged")
    return alpha


def configured_scaling(file: SingleFile, module: str, rank: int) -> float:
    """Return the scaling that a module of a rank has by the settings of diffusers, 1 without them."""
    if not has_settings(file, module):
        return 1.0
    part, _, name = module.partition(".")
    alpha = _patterned(file, part, "alpha_pattern", name, file.settings[f"{part}.lora_alpha"])
    root = bool(file.settings.get(f"{part}.use_rslora"))
    return float(alpha) / (math.sqrt(rank) if root else rank)


def _check_rank(file: SingleFile, module: str, rank: int) -> None:
    part, _, name = module.partition(".")
    configured = _patterned(file, part, "rank_pattern", name, file.settings.get(f"{part}.r", rank))
    if configured != rank:
        raise ShapeMismatchError(
            f"{file.path}: the factors of {module} are of rank {rank}, but {SETTINGS} says {configured}"
        )


def _patterned(file: SingleFile, part: str, pattern: str, name: str, default: Any) -> Any:
    patterns = file.settings.get(f"{part}.{pattern}") or {}
    value = default
    if isinstance(patterns, dict):
        try:
            value = patterns.get(get_pattern_key(patterns.keys(), name), default)
        except re.error as error:
            raise AdapterError(
                f"{file.path}: {part}.{pattern} of {SETTINGS} holds no regular expressions ({error})"
            ) from error
    if type(value) not in (int, float) or not math.isfinite(value):
        raise AdapterError(f"{file.path}: {part}.{pattern} of {SETTINGS} gives {name} {value!r}, no number")
    return value


def has_settings(file: SingleFile, module: str) -> bool:
    """Say whether the file's settings, and not an alpha of its own, give a module its scaling."""
    return f"{module.partition('.')[0]}.lora_alpha" in file.settings


def settings_for(file: SingleFile, ranks: Mapping[str, int]) -> str:
    """Return the settings under which diffusers gives modules these ranks, as JSON; every alpha stays.

    Args:
        file: whose settings are the start.
        ranks: of each module that `has_settings`.
    """
    settings = dict(file.settings)
    by_part: dict[str, dict[str, int]] = defaultdict(dict)
    for module, rank in ranks.items():
        part, _, name = module.partition(".")
        by_part[part][name] = rank
    for part, its in by_part.items():
        ((most, _),) = Counter(its.values()).most_common(1)
        settings[f"{part}.r"] = most
        # Patterns match the ends of names, and the first of them wins: longer ones come first. A name that
        # ends another one has to be there even if its rank is the usual one.
        ordered = sorted(its.items(), key=lambda item: -len(item[0]))
        settings[f"{part}.rank_pattern"] = dict(ordered) if len(set(its.values())) > 1 else {}
    return json.dumps(settings, indent=2)
