"""A model without weights, on which peft itself places an adapter.

Which tensor of the base an adapter's tensor belongs to, with which rank and scaling, and how stored
adapters are converted for newer model classes: peft and transformers know, so they are asked.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
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
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.initialization import no_init_weights

from mergekit_monosoup.errors import AdapterError, UnsupportedAdapterError
from mergekit_monosoup.lora.adapter import PREFIX, Adapter
from mergekit_monosoup.lora.factors import LowRankUpdate
from mergekit_monosoup.lora.fitting import with_prefix, with_swapped_stacks
from mergekit_monosoup.lora.placement import Change, NameMap, Placement

_NAME = "default"
_OF_THE_ADAPTER = (".lora_", ".modules_to_save.", ".token_adapter.trainable_tokens")
_TOKENS = ".token_adapter.trainable_tokens_delta"
_TASK_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}


def hollow_model(
    reference: ModelReference,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    adapter: Adapter | None = None,
) -> Any:
    """Return the base of a reference as transformers builds it, with parameters that take no memory.

    Args:
        reference: the base.
        dtype: of the parameters.
        trust_remote_code: as transformers has it.
        adapter: may ask for a longer vocabulary, or for a head that the base does not have.
    """
    config = reference.config(trust_remote_code)
    auto_class = get_auto_cls(config.architectures[0])
    try:
        model = _on_meta(auto_class, config, trust_remote_code)
        if adapter is not None and (other := _asked_for(adapter, model, config)) is not None:
            model = _on_meta(other or auto_class, config, trust_remote_code)
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
                shell = torch.zeros((), dtype=dtype, device="cpu").expand(parameter.shape)
                shells[id(parameter)] = nn.Parameter(shell, requires_grad=False)
            setattr(module, name, shells[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros((), dtype=buffer.dtype, device="cpu").expand(buffer.shape)
    return model


def _on_meta(auto_class: Any, config: Any, trust_remote_code: bool) -> Any:
    with torch.device("meta"), no_init_weights():
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def _asked_for(adapter: Adapter, model: Any, config: Any) -> Any | None:
    """Change the configuration to what an adapter was trained on.

    Returns:
        None where nothing changes, otherwise the class to build, or False for the same one.
    """
    whole = {key.removeprefix(PREFIX): adapter.tensors[key] for key in adapter.full}
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    head = [t for name, t in whole.items() if name not in held and name.endswith("weight") and t.ndim == 2]
    task = getattr(adapter.config.task_type, "value", adapter.config.task_type)
    other: Any = _TASK_CLASSES.get(str(task)) if head else None
    if other is not None:
        config.num_labels = min(len(tensor) for tensor in head)
    names = {id(module): name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    name = names.get(id(embedding))
    leaves = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
    found = (whole.get(f"{name}.{leaf}") for leaf in leaves)
    rows = next((len(tensor) for tensor in found if tensor is not None), None)
    if rows is not None and embedding is not None and rows != embedding.weight.shape[0]:
        config.get_text_config().vocab_size = rows
        other = other or False
    return other


def place(reference: ModelReference, adapter: Adapter, trust_remote_code: bool = False) -> Placement:
    """Let peft place an adapter on its base; return what it does, by the names of the model's tensors.

    Raises:
        AdapterError: the names or shapes of the adapter are not those of the base.
        UnsupportedAdapterError: the adapter changes the layers of the model.
    """
    if adapter.config.layer_replication:
        raise UnsupportedAdapterError(f"adapter {adapter.source} replicates layers (layer_replication)")
    dtypes = {t.dtype for t in adapter.tensors.values() if t.is_floating_point()}
    dtype = reduce(torch.promote_types, dtypes, torch.bfloat16)
    model = hollow_model(reference, dtype, trust_remote_code, adapter)
    names, tensors = NameMap(model), with_prefix(adapter, model)
    # Tied tensors are one parameter under several names. Held here, so that no id is given out again.
    shells = dict(model.named_parameters(remove_duplicate=False))
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            tensors = with_swapped_stacks(adapter, tensors, adapted)
            result = set_peft_model_state_dict(adapted, tensors, adapter_name=_NAME, low_cpu_mem_usage=True)
        except IndexError as error:
            raise AdapterError(
                f"adapter {adapter.source} trains tokens that base {reference.model} has no rows for; save "
                "it again with save_embedding_layers=True, so that it brings its embedding"
            ) from error
        except (ValueError, RuntimeError, KeyError) as error:
            raise AdapterError(
                f"adapter {adapter.source} does not fit base {reference.model}: {error}"
            ) from error
    strangers = [key for key in result.unexpected_keys if not _is_saved_twice(key, tensors)]
    strangers += [key for key in result.missing_keys if "lora_" in key and f".{_NAME}" in key]
    if strangers:
        raise AdapterError(
            f"adapter {adapter.source} is not of base {reference.model}: {len(strangers)} names do not "
            f"match, for instance {strangers[0]}; name the base that the adapter was trained on"
        )
    ties = {name: names for names in _aliases(shells).values() for name in names}
    return Placement(names, _changes(adapted, shells), ties)


def _is_saved_twice(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Say whether trained tokens are those of an embedding that the model ties to this one."""
    return key.endswith(_TOKENS) and any(
        other != key
        and other.endswith(_TOKENS)
        and tensors[other].shape == tensors[key].shape
        and torch.equal(tensors[other], tensors[key])
        for other in tensors
        if key in tensors
    )


def _aliases(shells: Mapping[str, nn.Parameter]) -> dict[int, list[str]]:
    aliases: dict[int, list[str]] = {}
    for name, parameter in shells.items():
        aliases.setdefault(id(parameter), []).append(name)
    return aliases


def _changes(adapted: PeftModel, shells: dict[str, nn.Parameter]) -> dict[str, Change]:
    aliases = _aliases(shells)
    whole: dict[str, Tensor] = {}
    rows: dict[str, tuple[Tensor, Tensor]] = {}
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
        elif isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            replaced = (
                torch.tensor(tokens.token_indices[_NAME], device="cpu"),
                tokens.trainable_tokens_delta[_NAME].data,
            )
            rows.update(dict.fromkeys(by_name[f"{plain}.weight"], replaced))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inexact.update(by_name[f"{plain}.weight"])
        elif isinstance(module, LoraLayer):
            for leaf, update in _layer_updates(module):
                for alias in by_name[f"{plain}.{leaf}"]:
                    low_rank.setdefault(alias, []).append(update)
            if module.lora_bias.get(_NAME):
                b = module.lora_B[_NAME].bias.data
                wide = torch.promote_types(b.dtype, torch.float32)
                shift[f"{plain}.bias"] = b.to(wide) * module.scaling[_NAME]
    # What is no shell any more has been filled by the adapter: biases and embeddings saved along.
    for path, parameter in adapted.named_parameters(remove_duplicate=False):
        if id(parameter) not in aliases and not any(part in path for part in _OF_THE_ADAPTER):
            name = _plain(path)
            if name in by_name:
                whole[name] = parameter.data
                if path.endswith(".base_layer.weight"):
                    frozen.add(name)
    return {
        name: Change(
            whole.get(name),
            rows.get(name),
            shift.get(name),
            tuple(low_rank.get(name, ())),
            name not in inexact,
            name in frozen,
        )
        for name in whole.keys() | rows.keys() | shift.keys() | low_rank.keys() | inexact
    }


def _plain(path: str) -> str:
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", path.removeprefix(PREFIX))


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
