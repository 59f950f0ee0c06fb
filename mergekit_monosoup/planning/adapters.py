"""Which tensors of its base an adapter touches, and whether it fits it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.adapter_folder import AdapterFolder, read_adapter_folder
from mergekit_monosoup.checkpoint.documents import first_line
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.hub import adapter_on_hub, cached_adapter
from mergekit_monosoup.errors import AdapterError, MonoSoupError, UnsupportedAdapterError

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Settings of LoraConfig under which the header alone does not tell where peft puts the factors.
_INVOLVED = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


def touched_tensors(reference: str, adapter: str, base: Checkpoint) -> frozenset[str] | None:
    """Return the tensors of the base that an adapter changes; None where that is not known before the merge.

    Of plain LoRA the header says it. Otherwise peft places the adapter on an empty model of the base's
    class, as the merge does; that takes seconds, and the download of the adapter.

    Args:
        reference: base and adapter, as mergekit spells them.
        adapter: its folder, or its id on the Hub (`id@revision`).
        base: the checkpoint it is put on.

    Raises:
        InputError: damaged, or not of this base.
    """
    folder = Path(adapter) if os.path.exists(adapter) else cached_adapter(adapter)
    found = adapter_on_hub(adapter) if folder is None else read_adapter_folder(adapter, folder)
    if not base.shapes_known:
        return None
    plain = _by_header(found, base) if found is not None else None
    return plain if plain is not None else _by_peft(reference, adapter, base)


def _by_header(adapter: AdapterFolder, base: Checkpoint) -> frozenset[str] | None:
    config = adapter.config
    targets = config.get("target_modules")
    if (
        config.get("peft_type") != "LORA"
        or any(config.get(key) for key in _INVOLVED)
        or config.get("bias") not in (None, "none")
        or config.get("lora_bias")
        or config.get("init_lora_weights") not in (None, True, False, "gaussian")
        or not isinstance(targets, list)
    ):
        return None
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in adapter.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            return None
        factors.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor.shape
    if not factors or not all(
        _fits(shapes, name, base, config.get("r", 8)) for name, shapes in factors.items()
    ):
        return None
    wanted = {
        name
        for name, tensor in base.tensors.items()
        if len(tensor.shape) == 2 and name.removesuffix(".weight").rpartition(".")[2] in targets
    }
    return frozenset(factors) if wanted == factors.keys() else None


def _fits(shapes: Mapping[str, tuple[int, ...]], name: str, base: Checkpoint, rank: Any) -> bool:
    if shapes.keys() != {"A", "B"} or name not in base.tensors:
        return False
    stored = base.tensors[name].shape
    return len(stored) == 2 and shapes["A"] == (rank, stored[1]) and shapes["B"] == (stored[0], rank)


def _by_peft(reference: str, adapter: str, base: Checkpoint) -> frozenset[str] | None:
    from mergekit.common import ModelReference

    from mergekit_monosoup.lora import hollow
    from mergekit_monosoup.lora.adapter import read_adapter

    try:
        placed = hollow.place(ModelReference.parse(reference), read_adapter(adapter))
        return frozenset(name for name in base.tensors if placed.change_of(name) is not None)
    except UnsupportedAdapterError:
        # Not linear: merged by peft first, and the method says what it takes.
        return None
    except MonoSoupError:
        raise
    except Exception as error:
        raise AdapterError(
            f"adapter {adapter}: peft cannot use its settings ({first_line(error)})"
        ) from error
