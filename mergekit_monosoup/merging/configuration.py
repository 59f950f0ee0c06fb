"""config.json of the result: the fine-tuned checkpoint's, put right where the written weights differ."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.headers import StoredTensor

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "shared.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TYPES = ("dtype", "torch_dtype")
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


def written_config(
    source: Mapping[str, Any],
    written: Mapping[str, StoredTensor],
    before: Mapping[str, StoredTensor],
    *,
    equal: Callable[[str, str], bool] = lambda one, other: False,
    layers: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return a configuration that is true of the written weights.

    It is `source` in its own form (keys, their order, spelling of rope and dtype) but for

    - `tie_word_embeddings`: as the files are: false where they hold a head of their own;
    - `dtype`: that of most of the written parameters;
    - `vocab_size`: the rows of the written embedding, where they are others than the checkpoint's;
    - the number of layers, where the recipe has changed it;
    - `quantization_config`: gone, and local paths with it.

    Args:
        source: config.json of the checkpoint that the files come from.
        written: the tensors of the result.
        before: those of that checkpoint.
        equal: whether two tensors of the result hold the same bytes.
        layers: numbers of layers by their keys (`text_config.num_hidden_layers`).
    """
    config = copy.deepcopy(dict(source))
    for part in _parts(config):
        part.pop("quantization_config", None)
        part.pop("compression_config", None)
        if isinstance(path := part.get("_name_or_path"), str) and (
            path[:1] in "/.~\\" or Path(path).exists()
        ):
            part.pop("_name_or_path")
    _set_types(config, written)
    _set_tied(config, written, equal)
    _set_vocabulary(config, written, before)
    for key, count in (layers or {}).items():
        *path, last = key.split(".")
        part = config
        for step in path:
            part = part[step] if isinstance(part.get(step), dict) else part
        if last in part:
            part[last] = count
    return config


def write_config(file: Path, original: bytes, source: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write a configuration: the bytes it came in where nothing had to be changed."""
    if config == source:
        file.write_bytes(original)
    else:
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        config,
        *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict)),
    ]


def _set_types(config: dict[str, Any], written: Mapping[str, StoredTensor]) -> None:
    counts: Counter[str] = Counter()
    for tensor in written.values():
        if tensor.dtype in _FLOATS:
            counts[tensor.dtype] += math.prod(tensor.shape)
    if not counts:
        return
    most = counts.most_common(1)[0][0]
    found = False
    for part in _parts(config):
        for key in _TYPES:
            if part.get(key) in _FLOATS:
                part[key] = most
                found = found or part is config
    if not found:
        config["dtype"] = most


def _set_tied(
    config: dict[str, Any], written: Mapping[str, StoredTensor], equal: Callable[[str, str], bool]
) -> None:
    head = _named(written, _HEADS)
    embedding = _named(written, _EMBEDDINGS)
    if embedding is None or not any(str(n).endswith(_GENERATES) for n in config.get("architectures") or ()):
        return
    said = [part for part in _parts(config) if "tie_word_embeddings" in part]
    if head is not None and not equal(head, embedding):
        tied = False
    elif head is None and written[embedding].shape:
        tied = True
    else:
        return
    if not said:
        # Without the key, the default of the model's class counts, whichever that is.
        config["tie_word_embeddings"] = tied
    for part in said:
        part["tie_word_embeddings"] = tied


def _set_vocabulary(
    config: dict[str, Any], written: Mapping[str, StoredTensor], before: Mapping[str, StoredTensor]
) -> None:
    embedding = _named(written, _EMBEDDINGS)
    if embedding is None:
        return
    name = embedding.rpartition(".")[0].rpartition(".")[2]
    old = next((t for key, t in before.items() if key.endswith(f"{name}.weight")), None)
    rows = written[embedding].shape[0]
    for part in _parts(config):
        size = part.get("vocab_size")
        if isinstance(size, int) and rows != size and (old is None or old.shape[0] == size):
            part["vocab_size"] = rows


def _named(tensors: Mapping[str, StoredTensor], endings: tuple[str, ...]) -> str | None:
    return next((name for name in tensors if name.endswith(endings)), None)
