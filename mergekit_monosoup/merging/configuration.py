"""config.json of the result: the fine-tuned checkpoint's, put right where the written weights differ."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.headers import StoredTensor
from mergekit_monosoup.merging.layer_settings import renumber_layers

LOG = logging.getLogger(__name__)

Tensors = Mapping[str, StoredTensor]

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "shared.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "backbone.embeddings.weight",
)
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TYPES = ("dtype", "torch_dtype")
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_TOKEN_ID = re.compile("_token_(id|ids|index)$")


def written_config(
    source: Mapping[str, Any],
    written: Tensors,
    before: Tensors,
    *,
    equal: Callable[[str, str], bool] = lambda one, other: False,
    layers: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Return a configuration that is true of the written weights.

    It is `source` in its own form (keys, their order, spelling of rope and dtype) but for

    - `tie_word_embeddings`: as the files are; false where they hold a head of their own;
    - `dtype`: that of most of the written parameters;
    - `vocab_size`: the rows of the written embedding, where they are others than the checkpoint's;
    - the number of layers, and what is said of single ones, where the recipe has changed them;
    - `quantization_config`, and `_name_or_path` where it is a local one: gone.

    Args:
        source: config.json of the checkpoint that the files come from.
        written: the tensors of the result.
        before: those of that checkpoint; empty where they are not known.
        equal: whether two tensors of the result hold the same bytes.
        layers: from which layer each layer of the result is, by the key of their number
            (`text_config.num_hidden_layers`).
    """
    config = copy.deepcopy(dict(source))
    for part in _parts(config):
        part.pop("quantization_config", None)
        part.pop("compression_config", None)
        if is_local_path(part.get("_name_or_path")):
            part.pop("_name_or_path")
    _set_types(config, written)
    _set_tied(config, written, equal)
    _set_vocabulary(config, written, before)
    for key, sources in (layers or {}).items():
        _set_layers(config, key, sources)
    return config


def write_config(file: Path, original: bytes, source: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write a configuration: the bytes it came in where nothing had to be changed."""
    if config == source:
        file.write_bytes(original)
    else:
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def is_local_path(value: object) -> bool:
    """Say whether what a configuration names is a folder of some machine rather than an id on the Hub."""
    if not isinstance(value, str) or not value:
        return False
    return value[0] in "/.~\\" or ":\\" in value or value.count("/") > 1 or Path(value).exists()


def renumbered(content: Mapping[str, Any], ids: Mapping[int, int | None], default: int | None) -> Any:
    """Return a configuration whose token ids are those of another vocabulary.

    Args:
        content: of config.json or generation_config.json; nested parts are gone through.
        ids: the new id of each old one, None where the new vocabulary lacks the token.
        default: end-of-text token of the new vocabulary, where none of the old ones is left.
    """

    def renewed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: renewed(k, v) for k, v in value.items()}
        if not _TOKEN_ID.search(key):
            return value
        if isinstance(value, list):
            kept = [new for old in value if (new := ids.get(old)) is not None]
            return kept or (default if key.startswith("eos") else None)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            new = ids.get(value)
            return default if new is None and key.startswith("eos") else new
        return value

    return {key: renewed(key, value) for key, value in content.items()}


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a configuration and those nested in it (`text_config`, `vision_config`)."""
    inner = (part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict))
    return [config, *(part for one in inner for part in _parts(one))]


def _set_types(config: dict[str, Any], written: Tensors) -> None:
    counts: Counter[str] = Counter()
    for tensor in written.values():
        if tensor.dtype in _FLOATS:
            counts[tensor.dtype] += tensor.size
    if not counts:
        return
    most = counts.most_common(1)[0][0]
    said = next((config[key] for key in _TYPES if config.get(key) in _FLOATS), None)
    for part in _parts(config):
        for key in _TYPES:
            # A part that speaks for itself (a vision tower in float32) keeps its word.
            if part.get(key) in _FLOATS and part[key] in (said, most if said is None else said):
                part[key] = most
    if said is None:
        config[next((key for key in _TYPES if key in config), _spelling(config))] = most


def _spelling(config: Mapping[str, Any]) -> str:
    """Return which key the version of transformers that wrote a configuration reads."""
    version = str(config.get("transformers_version", ""))
    major = version.partition(".")[0]
    return "dtype" if major.isdigit() and int(major) >= 5 else "torch_dtype"


def _set_tied(config: dict[str, Any], written: Tensors, equal: Callable[[str, str], bool]) -> None:
    # Of encoder-decoders the key says more than that: in T5's it is also how outputs are scaled.
    if config.get("is_encoder_decoder") or not any(
        str(name).endswith(_DECODERS) for name in config.get("architectures") or ()
    ):
        return
    embedding = _named(written, _EMBEDDINGS)
    head = _named(written, _HEADS)
    if embedding is None or (head is not None and equal(head, embedding)):
        return
    if head is None and any(
        tensor.shape == written[embedding].shape and name != embedding for name, tensor in written.items()
    ):
        # Perhaps a head under a name of its own (`output.weight`): its configuration knows best.
        return
    tied = head is None
    said = [part for part in _parts(config) if "tie_word_embeddings" in part]
    for part in said:
        part["tie_word_embeddings"] = tied
    if config not in said and _default_tied(config.get("model_type")) is not tied:
        config["tie_word_embeddings"] = tied


def _default_tied(model_type: object) -> bool | None:
    """Return what holds for a class of model whose configuration is silent; None where it is not known."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    found = getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", None)
    return found if isinstance(found, bool) else None


def _set_vocabulary(config: dict[str, Any], written: Tensors, before: Tensors) -> None:
    embedding = _named(written, _EMBEDDINGS)
    if embedding is None:
        return
    rows = written[embedding].shape[0]
    old = _rows(before, embedding)
    for part in (config, *(config[key] for key in ("text_config", "llm_config") if key in config)):
        size = part.get("vocab_size") if isinstance(part, dict) else None
        # Where the checkpoint itself has other rows than it says, that is the way of its class.
        if isinstance(size, int) and rows != size and old in (None, size):
            part["vocab_size"] = rows


def _rows(tensors: Tensors, name: str) -> int | None:
    """Return the rows of an embedding that another version of the model may hold under another prefix."""
    last = name.split(".")[-2:]
    found = tensors.get(name) or next((t for n, t in tensors.items() if n.split(".")[-2:] == last), None)
    return found.shape[0] if found is not None and found.shape else None


def _set_layers(config: dict[str, Any], key: str, sources: Sequence[int]) -> None:
    *path, last = key.split(".")
    part = config
    for step in path:
        if not isinstance(part.get(step), dict):
            return
        part = part[step]
    before = part.get(last)
    part[last] = len(sources)
    untrue = renumber_layers(part, before, sources) if isinstance(before, int) else []
    if untrue:
        LOG.warning(
            "config.json says by %s which layers are of which kind, and slices moved them; check that it "
            "is true of the %d layers of the result",
            " and ".join(untrue),
            len(sources),
        )


def _named(tensors: Tensors, endings: tuple[str, ...]) -> str | None:
    return next((name for name in tensors if name.endswith(endings)), None)
