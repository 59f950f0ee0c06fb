"""Names of an adapter's tensors as peft's `save_pretrained` gives them, whatever else wrote them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping

from torch import Tensor

from mergekit_monosoup.errors import AdapterError
from mergekit_monosoup.lora.said import warn_once

LOG = logging.getLogger(__name__)

PREFIX = "base_model.model."
# What torch.compile and FSDP put between the modules of a model; no module has such a name itself.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")
# `get_peft_model_state_dict` takes the adapter's name out of these; a bare `state_dict` has it.
_NAMED = re.compile(
    r"\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save|token_adapter\.trainable_tokens_delta)"
    r"\.(?P<name>[^.]+)(?P<leaf>(?:\..+)?)$"
)
_LEAVES = frozenset({"weight", "bias"})


def plain_keys(source: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the names that peft's `save_pretrained` would give them.

    Args:
        source: for messages.
        tensors: as they are stored.

    Raises:
        AdapterError: empty tensors, several adapters in one file, or a name without peft's prefix.
    """
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterError(
                f"adapter {source}: {key} is of shape {list(tensor.shape)}, so the adapter was saved under "
                "ZeRO-3 without gathering; save it again with stage3_gather_16bit_weights_on_model_save"
            )
    renamed = {_WRAPPERS.sub("", key): tensor for key, tensor in tensors.items()}
    for prefix, rename in _PREFIXES:
        if renamed and all(key.startswith(prefix) for key in renamed):
            warn_once(LOG, "adapter %s: its names begin with %s; read as %s", source, prefix, PREFIX)
            renamed = {rename(key): tensor for key, tensor in renamed.items()}
    for key in renamed:
        if not key.startswith(PREFIX):
            raise AdapterError(
                f"adapter {source}: {key} does not start with {PREFIX}; save the adapter by peft's "
                "save_pretrained"
            )
    return _without_wrappers(_without_adapter_name(source, renamed))


_PREFIXES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("module.", lambda key: key.removeprefix("module.")),
    (PREFIX * 2, lambda key: key.removeprefix(PREFIX)),
)


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors once, by the names of their modules.

    Of a longer vocabulary, peft saves a trained embedding three times: as it is named in the model, by its
    wrapper, and the untrained original.
    """
    plain = {}
    for key, tensor in tensors.items():
        if ".original_module." in key:
            twins = (key.replace(".original_module.", other, 1) for other in (".", ".modules_to_save."))
            if any(twin in tensors for twin in twins):
                continue
        if ".modules_to_save." in key:
            key = key.replace(".modules_to_save.", ".", 1)
            if key in tensors:
                continue
        plain[key] = tensor
    return plain


def _without_adapter_name(source: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {key: match for key in tensors if (match := _NAMED.search(key)) is not None}
    found = {k: m for k, m in found.items() if m["leaf"] or m["name"] not in _LEAVES}
    names = sorted({match["name"] for match in found.values()})
    if len(names) > 1:
        if "default" not in names:
            raise AdapterError(
                f"adapter {source}: one file with several adapters ({', '.join(names)}); save each by peft's "
                "save_pretrained"
            )
        # As peft does, which loads an adapter under this name.
        warn_once(LOG, "adapter %s: read as 'default' of %s", source, ", ".join(names))
        others = {key for key, match in found.items() if match["name"] != "default"}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in others}
    plain = {}
    for key, tensor in tensors.items():
        if ".original_module." in key and names:
            continue
        if (match := found.get(key)) is not None:
            kind = "" if match["kind"] == "modules_to_save" else f".{match['kind']}"
            key = f"{key[: match.start()]}{kind}{match['leaf']}"
        plain[key] = tensor
    return plain
