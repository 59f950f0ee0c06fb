"""A model without weights, on which peft itself places an adapter.

Which tensor of the base an adapter's tensor belongs to, with which rank and scaling, and how stored
adapters are converted for newer model classes: peft and transformers know, so they are asked.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from mergekit.common import ModelReference, get_auto_cls
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from mergekit_monosoup.errors import AdapterError, UnsupportedAdapterError
from mergekit_monosoup.lora.adapter import PREFIX, Adapter
from mergekit_monosoup.lora.factors import LowRankUpdate

_NAME = "default"


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor: any of a new value, an added tensor and a low-rank update.

    `frozen` says that the new value is the base's own, saved along; `exact` is False where peft changes
    the tensor in a way that is none of these.
    """

    whole: Tensor | None = None
    shift: Tensor | None = None
    low_rank: tuple[LowRankUpdate, ...] = ()
    exact: bool = True
    frozen: bool = False


def hollow_model(reference: ModelReference, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Return the base of a reference as transformers builds it, with parameters that take no memory."""
    config = reference.config(trust_remote_code)
    try:
        with torch.device("meta"), no_init_weights():
            model = get_auto_cls(config.architectures[0]).from_config(
                config, trust_remote_code=trust_remote_code
            )
        model.tie_weights()
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise UnsupportedAdapterError(
            f"the model class of {reference.model} cannot be built without weights: {error}"
        ) from error
    # peft moves an adapter to the device of its base layer: on meta, its values would be lost. One zero
    # with strides of zero has any shape.
    shells: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in shells:
                shell = torch.zeros((), dtype=dtype).expand(parameter.shape)
                shells[id(parameter)] = nn.Parameter(shell, requires_grad=False)
            setattr(module, name, shells[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model


class NameMap:
    """Names of a checkpoint's tensors, old and new, to those of the model class."""

    def __init__(self, model: Any) -> None:
        self._state = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
        self._state |= {name: True for name, _ in model.named_buffers()}
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = getattr(model, "base_model_prefix", None)

    def resolve(self, name: str) -> str | None:
        """Return the model's name of a tensor, or None where it is stored in another form."""
        if name in self._state:
            return name
        renamed, converter = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        return renamed if converter is None and renamed in self._state else None


def place(
    reference: ModelReference, adapter: Adapter, trust_remote_code: bool = False
) -> tuple[NameMap, dict[str, Change]]:
    """Let peft place an adapter on its base; return what it does, by the names of the model's tensors.

    Raises:
        AdapterError: the names or shapes of the adapter are not those of the base.
        UnsupportedAdapterError: the adapter changes the layers of the model.
    """
    if adapter.config.layer_replication:
        raise UnsupportedAdapterError(f"adapter {adapter.source} replicates layers (layer_replication)")
    dtypes = {t.dtype for t in adapter.tensors.values() if t.is_floating_point()}
    model = hollow_model(reference, reduce(torch.promote_types, dtypes, torch.bfloat16), trust_remote_code)
    names = NameMap(model)
    # Tied tensors are one parameter under several names. Held here, so that no id is given out again.
    shells = dict(model.named_parameters(remove_duplicate=False))
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(
                adapted, dict(adapter.tensors), adapter_name=_NAME, low_cpu_mem_usage=True
            )
        except (ValueError, RuntimeError, KeyError) as error:
            raise AdapterError(
                f"adapter {adapter.source} does not fit base {reference.model}: {error}"
            ) from error
    strangers = list(result.unexpected_keys)
    strangers += [key for key in result.missing_keys if "lora_" in key and f".{_NAME}" in key]
    if strangers:
        raise AdapterError(
            f"adapter {adapter.source} is not of base {reference.model}: {len(strangers)} names do not "
            f"match, for instance {strangers[0]}; name the base that the adapter was trained on"
        )
    return names, _changes(adapted, shells)


def _changes(adapted: PeftModel, shells: dict[str, nn.Parameter]) -> dict[str, Change]:
    aliases: dict[int, list[str]] = {}
    for name, parameter in shells.items():
        aliases.setdefault(id(parameter), []).append(name)
    whole: dict[str, Tensor] = {}
    shift: dict[str, Tensor] = {}
    low_rank: dict[str, list[LowRankUpdate]] = {}
    inexact: set[str] = set()
    frozen: set[str] = set()
    by_name = {name: names for names in aliases.values() for name in names}
    for path, module in adapted.named_modules():
        plain = _plain(path)
        if isinstance(module, ModulesToSaveWrapper):
            for leaf, parameter in module.modules_to_save[_NAME].named_parameters():
                whole[f"{plain}.{leaf}"] = parameter.data
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inexact.update(by_name[f"{plain}.weight"])
        elif isinstance(module, LoraLayer):
            for leaf, update in _layer_updates(module):
                for alias in by_name[f"{plain}.{leaf}"]:
                    low_rank.setdefault(alias, []).append(update)
            if module.lora_bias.get(_NAME):
                b = module.lora_B[_NAME].bias.data
                shift[f"{plain}.bias"] = b * module.scaling[_NAME]
    # What is no shell any more has been filled by the adapter: biases and embeddings saved along.
    for path, parameter in adapted.named_parameters(remove_duplicate=False):
        if id(parameter) not in aliases and ".lora_" not in path and ".modules_to_save." not in path:
            name = _plain(path)
            if name in by_name:
                whole[name] = parameter.data
                if path.endswith(".base_layer.weight"):
                    frozen.add(name)
    return {
        name: Change(
            whole.get(name),
            shift.get(name),
            tuple(low_rank.get(name, ())),
            name not in inexact,
            name in frozen,
        )
        for name in whole.keys() | shift.keys() | low_rank.keys() | inexact
    }


def _plain(path: str) -> str:
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", path.removeprefix(PREFIX))


def _layer_updates(layer: LoraLayer) -> Iterator[tuple[str, LowRankUpdate]]:
    """Yield the tensors that a layer adapts and their updates, laid out as the tensors are."""
    scaling = float(layer.scaling[_NAME])
    if isinstance(layer, Embedding):
        # tokens x dimension, while peft keeps A as rank x tokens
        a, b = layer.lora_embedding_A[_NAME].data, layer.lora_embedding_B[_NAME].data
        yield "weight", _matrix(a.T, b.T, scaling, layer.get_base_layer().weight)
        return
    a, b = layer.lora_A[_NAME].weight.data, layer.lora_B[_NAME].weight.data
    if isinstance(layer, ParamWrapper):
        yield layer.parameter_name, _stack(layer, a, b, scaling)
    elif isinstance(layer, MultiheadAttention):
        yield "in_proj_weight", _matrix(b, a, scaling, layer.get_base_layer().in_proj_weight)
    elif isinstance(layer, (Conv1d, Conv2d, Conv3d)):
        flat = b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)
        yield "weight", _matrix(*flat, scaling, layer.get_base_layer().weight)
    elif isinstance(layer, Linear):
        factors = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
        yield "weight", _matrix(*factors, scaling, layer.get_base_layer().weight)
    else:
        raise UnsupportedAdapterError(f"layers of type {type(layer).__name__} are not known to be linear")


def _matrix(left: Tensor, right: Tensor, scaling: float, weight: Tensor) -> LowRankUpdate:
    return LowRankUpdate(left[None], right[None], scaling, tuple(weight.shape))


def _stack(layer: Any, a: Tensor, b: Tensor, scaling: float) -> LowRankUpdate:
    experts, weight = layer.num_experts, layer.get_param()
    right = a.reshape(experts, -1, a.shape[-1])
    left = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    if weight.ndim == 3 and not getattr(layer, "_did_swap_in_out_features", False):
        # stored as experts x in x out
        left, right = right.mT, left.mT
    return LowRankUpdate(left, right, scaling, tuple(weight.shape))
