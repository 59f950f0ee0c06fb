"""Bring an adapter's tensors into the form that the present peft and model class give them.

Adapters outlive the versions that wrote them: peft's own conversion knows the names of older model classes,
not a body saved without its head, nor stacks whose axes an older peft took the other way round.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from mergekit_monosoup.lora.adapter import PREFIX, Adapter, plain_name
from mergekit_monosoup.lora.said import warn_once

LOG = logging.getLogger(__name__)

# Since then, peft takes a stack without `is_transposed` as experts x out x in; before, as experts x in x out.
_SWAPPED_SINCE = Version("0.19.0")
_PARAMETER = re.compile(r"\.(lora_(A|B|embedding_A|embedding_B)(\.weight|\.bias)?|[^.]+)$")


def with_prefix(adapter: Adapter, model: Any) -> Mapping[str, Tensor]:
    """Return the tensors by the names of the modules of a model, where one prefix makes the difference.

    Args:
        adapter: as it was read.
        model: the base, without adapter.
    """
    modules = {name for name, _ in model.named_modules()}
    named = {key: plain_name(_PARAMETER.sub("", key.removeprefix(PREFIX))) for key in adapter.tensors}
    if not named or any(module in modules for module in named.values()):
        return adapter.tensors
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    first = next(iter(named.values()))
    for old, new in (("", prefix), (first.partition(".")[0] + ".", ""), (prefix, "")):
        if new + old == "." or not all(m.startswith(old) for m in named.values()):
            continue
        if all(new + m.removeprefix(old) in modules for m in named.values()):
            warn_once(
                LOG,
                "adapter %s: names that begin with %r are read as %r, as those of the base do (%s)",
                adapter.source,
                PREFIX + old,
                PREFIX + new,
                first,
            )
            return {PREFIX + new + k.removeprefix(PREFIX + old): t for k, t in adapter.tensors.items()}
    return adapter.tensors


def with_swapped_stacks(adapter: Adapter, tensors: Mapping[str, Tensor], adapted: Any) -> dict[str, Tensor]:
    """Return the tensors with the factors of stacks (`target_parameters`) as the present peft has them.

    An older peft took experts x out x in for experts x in x out: dW = (B A)^T, so that A^T is the new B.

    Args:
        adapter: as it was read.
        tensors: its tensors by the names of the model's modules.
        adapted: the base with an empty adapter on it.
    """
    fitted = dict(tensors)
    for path, layer in adapted.named_modules():
        if not isinstance(layer, ParamWrapper) or layer.num_experts == 1:
            continue
        key_a, key_b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        if key_a not in tensors or key_b not in tensors:
            continue
        a, b = tensors[key_a], tensors[key_b]
        if (a.shape[1], b.shape[0]) != (layer.out_features, layer.in_features):
            continue
        if layer.in_features == layer.out_features and not _swaps(adapter, layer):
            continue
        experts = layer.num_experts
        fitted[key_a] = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0).reshape(-1, b.shape[0])
        fitted[key_b] = a.reshape(experts, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)
    return fitted


def _swaps(adapter: Adapter, layer: ParamWrapper) -> bool:
    """Say for a stack of square matrices whether the peft that trained the adapter had its axes swapped."""
    if not layer._did_swap_in_out_features:
        return False
    try:
        return Version(str(adapter.settings.get("peft_version", "0"))) < _SWAPPED_SINCE
    except InvalidVersion:
        return False
