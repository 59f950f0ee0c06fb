"""A PEFT LoRA adapter as it lies on disk: configuration, factors, and full tensors."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from mergekit.common import ModelPath
from peft import LoraConfig, PeftConfig, load_peft_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import Tensor

from mergekit_monosoup.checkpoint.headers import unreadable_pickle
from mergekit_monosoup.errors import AdapterError, NonFiniteError, ShapeMismatchError, UnsupportedAdapterError
from mergekit_monosoup.lora.factors import LowRankUpdate
from mergekit_monosoup.lora.keys import PREFIX as PREFIX
from mergekit_monosoup.lora.keys import plain_keys
from mergekit_monosoup.lora.stacks import with_peft_layout
from mergekit_monosoup.lora.variants import refuse_nonlinear

# What an adapter's folder may hold besides the adapter, and what belongs to a copy of it.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>A\.weight|B\.weight|embedding_A|embedding_B)$")
_BIAS = ".lora_B.bias"


@dataclass(frozen=True)
class AdaptedModule:
    """One pair of factors: where its tensors are, and what they stand for.

    `module` is the name in the base model, with peft's own `base_layer` levels where several parameters
    of one module are adapted; `experts` counts the matrices of a stack (`target_parameters`), else 1.
    """

    module: str
    key_a: str
    key_b: str
    rank: int
    alpha: float
    scaling: float
    experts: int

    def update(self, tensors: Mapping[str, Tensor]) -> LowRankUpdate:
        """Return dW as `[experts, out, in]` (for an embedding `[experts, dimension, tokens]`).

        A convolution counts as one matrix `[out, in * k * ...]`.

        Raises:
            ShapeMismatchError: the factors do not multiply.
        """
        a, b = tensors[self.key_a], tensors[self.key_b]
        rows = b.shape[0]
        # peft flattens a stack expert by expert in A and rank by rank in B.
        right = a.reshape(self.experts, self.rank, -1)
        left = b.reshape(rows, self.rank, self.experts).permute(2, 0, 1)
        return LowRankUpdate(left, right, self.scaling, (self.experts, rows, right.shape[2]))

    def store(self, update: LowRankUpdate) -> tuple[Tensor, Tensor]:
        """Return the two-axis tensors A and B that peft would store for an update."""
        a = update.right.reshape(-1, update.right.shape[2])
        b = update.left.permute(1, 2, 0).reshape(update.left.shape[1], -1)
        return a, b


@dataclass(frozen=True)
class Adapter:
    """An adapter whose every tensor has been checked.

    `settings` is adapter_config.json as it was stored; `biases` are the `lora_B.bias` keys by module;
    `full` are the keys of tensors saved whole (`modules_to_save`, biases, resized embeddings).
    """

    source: str
    folder: Path
    config: LoraConfig
    settings: dict[str, Any]
    tensors: Mapping[str, Tensor]
    modules: tuple[AdaptedModule, ...]
    biases: tuple[str, ...]
    full: tuple[str, ...]


def fetch(source: str) -> Path:
    """Return the folder of an adapter: the local one, or the Hub's, downloaded (`id` or `id@revision`).

    Raises:
        AdapterError: there is no adapter_config.json.
    """
    path = Path(source)
    if not path.is_dir():
        if path.exists() or source[:1] in "/.~":
            raise AdapterError(f"adapter {source} is not a folder; name the folder of {CONFIG_NAME}")
        reference = ModelPath.model_validate(source)
        files = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, *COMPANIONS]
        try:
            path = Path(snapshot_download(reference.path, revision=reference.revision, allow_patterns=files))
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"adapter {source} is neither a local folder nor to be had from the Hub: {error}"
            ) from error
    if not (path / CONFIG_NAME).is_file():
        raise AdapterError(f"adapter {source} has no {CONFIG_NAME}; is it the folder of a PEFT adapter?")
    return path


def read_config(source: str, folder: Path) -> PeftConfig:
    """Return the configuration of an adapter as peft reads it.

    Raises:
        AdapterError: the file is damaged.
        UnsupportedAdapterError: peft does not know the type.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except KeyError as error:
        raise UnsupportedAdapterError(
            f"adapter {source}: {CONFIG_NAME} asks for {error}, which this version of peft does not know; "
            "upgrade peft, or merge the adapter into its base first"
        ) from error
    except (ValueError, TypeError) as error:
        raise AdapterError(f"adapter {source}: {CONFIG_NAME} cannot be read: {error}") from error


def read_adapter(source: str) -> Adapter:
    """Read and check a linear LoRA adapter; `adapter_model.bin` is never unpickled into objects.

    Args:
        source: a folder, a Hub id, or `id@revision`.

    Raises:
        UnsupportedAdapterError: not LoRA, or a variant that is not linear.
        AdapterError: files or factors are missing, or the names are not those of an adapter.
        ShapeMismatchError: factors that do not multiply, or of another rank than the configuration says.
        NonFiniteError: NaN or infinity in a tensor.
    """
    folder = fetch(source)
    config = refuse_nonlinear(read_config(source, folder), source)
    settings = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    tensors = plain_keys(source, read_tensors(source, folder))
    for key, tensor in tensors.items():
        # The extremes carry NaN and infinity on, and cost a fraction of looking at each entry.
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise NonFiniteError(f"adapter {source}: {key} holds NaN or infinity; its training diverged")
    pairs: dict[str, dict[str, str]] = {}
    biases, full = [], []
    for key in tensors:
        if match := _FACTOR.match(key):
            pairs.setdefault(match["module"], {})[match["kind"].removeprefix("embedding_")[0]] = key
        elif key.endswith(_BIAS):
            biases.append(key)
        elif ".lora_" in key:
            raise UnsupportedAdapterError(
                f"adapter {source}: {key} is no factor of plain LoRA; merge the adapter into its base first"
            )
        else:
            full.append(key)
    if not pairs and not full:
        raise AdapterError(f"adapter {source} holds no LoRA factors")
    modules = _modules(source, config, tensors, pairs)
    tensors, settings = with_peft_layout(source, settings, tensors, modules)
    for key in biases:
        if key.removesuffix(_BIAS) not in pairs:
            raise AdapterError(f"adapter {source}: {key} has no factors beside it")
    return Adapter(source, folder, config, settings, tensors, modules, tuple(biases), tuple(full))


def read_tensors(source: str, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names in its file.

    Raises:
        AdapterError: there is no file, or it is damaged.
    """
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise AdapterError(f"adapter {source} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")
    try:
        tensors: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except SafetensorError as error:
        raise AdapterError(f"adapter {source}: {SAFETENSORS_WEIGHTS_NAME} is damaged: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise AdapterError(str(unreadable_pickle(folder / WEIGHTS_NAME, error))) from error
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise AdapterError(f"adapter {source}: {key} is no tensor")
    return tensors


def _modules(
    source: str, config: LoraConfig, tensors: Mapping[str, Tensor], pairs: Mapping[str, Mapping[str, str]]
) -> tuple[AdaptedModule, ...]:
    modules = []
    for name in sorted(pairs, key=_natural):
        keys = pairs[name]
        for missing in {"A", "B"} - set(keys):
            (present,) = keys.values()
            raise AdapterError(f"adapter {source}: {present} has no lora_{missing} beside it")
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        module = name.removeprefix(PREFIX)
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != math.prod(b.shape[1:]):
            raise ShapeMismatchError(
                f"adapter {source}: {keys['A']} {tuple(a.shape)} and {keys['B']} {tuple(b.shape)} do not "
                "multiply (factors of grouped convolutions do not either)"
            )
        rank, alpha, experts = _rank_and_alpha(source, config, module, pairs, tensors)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        modules.append(AdaptedModule(module, keys["A"], keys["B"], rank, alpha, scaling, experts))
    return tuple(modules)


def _rank_and_alpha(
    source: str,
    config: LoraConfig,
    module: str,
    pairs: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
) -> tuple[int, float, int]:
    rows = tensors[pairs[PREFIX + module]["A"]].shape[0]
    names = parameter_names(config, module)
    rank, alpha = _configured(config, module)
    if not names:
        if rows == rank:
            return rank, alpha, 1
        names = parameter_names(config, module, anywhere=True)
    if not names:
        raise ShapeMismatchError(
            f"adapter {source}: the factors of {module} are of rank {rows}, but {CONFIG_NAME} says {rank}"
        )
    # Which parameter a level of nesting belongs to depends on the base model. Only assignments that give
    # every level the same number of experts are possible; mostly they agree on rank and alpha.
    plain = plain_name(module)
    levels = sorted(n.removeprefix(PREFIX) for n in pairs if plain_name(n.removeprefix(PREFIX)) == plain)
    heights = [tensors[pairs[PREFIX + level]["A"]].shape[0] for level in levels]
    found = set()
    for choice in permutations(names, len(levels)):
        settings = [_configured(config, name) for name in choice]
        counts = {height / rank for height, (rank, _) in zip(heights, settings, strict=True)}
        if len(counts) == 1 and (count := counts.pop()).is_integer():
            found.add((*settings[levels.index(module)], int(count)))
    if len(found) != 1:
        raise AdapterError(
            f"adapter {source}: rank_pattern and alpha_pattern leave open which rank {module} has "
            f"({len(found)} possibilities for {rows} rows); give all target_parameters of one module the "
            "same rank and alpha"
        )
    return found.pop()


def _configured(config: LoraConfig, name: str) -> tuple[int, float]:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), name), config.r)
    return rank, alphas.get(get_pattern_key(alphas.keys(), name), config.lora_alpha)


def parameter_names(config: LoraConfig, module: str, *, anywhere: bool = False) -> list[str]:
    """Return the full names of the parameters of a module that `target_parameters` adapts.

    A target without a module's name can be in any module: it counts only with `anywhere`.
    """
    plain = plain_name(module)
    names = set()
    for target in config.target_parameters or []:
        parent, _, leaf = target.rpartition(".")
        if f".{plain}".endswith(f".{parent}") if parent else anywhere:
            names.add(f"{plain}.{leaf}")
    return sorted(names)


def plain_name(module: str) -> str:
    """Return the module's name without the levels that peft adds to wrap several parameters."""
    return re.sub(r"(\.base_layer)+$", "", module)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
