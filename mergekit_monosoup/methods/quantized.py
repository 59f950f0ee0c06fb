"""Recognise checkpoints whose weights are stored as integers, from their headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from mergekit_monosoup.errors import QuantizedWeightError

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# Integer buffers such as position ids are fine; integer matrices under these names are weights.
_WEIGHT_SUFFIXES = ("weight", "qweight", "weight_packed", "blocks")
_INTEGER_TYPES = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4"})


def refuse_quantized_checkpoint(model: ModelReference) -> None:
    """Refuse a checkpoint with integer weights (GPTQ, AWQ, bitsandbytes and the like).

    Reads safetensors headers only, and only of files that mergekit has at hand already.

    Raises:
        QuantizedWeightError: names the file, the tensor, its storage type and the remedy.
    """
    for path in _header_files(model):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                if not name.endswith(_WEIGHT_SUFFIXES):
                    continue
                view = file.get_slice(name)
                if view.get_dtype() in _INTEGER_TYPES and len(view.get_shape()) >= 2:
                    raise QuantizedWeightError(
                        f"{model}: tensor {name} in {os.path.basename(path)} is stored as integers "
                        f"({view.get_dtype()}), so the checkpoint is quantised; dequantise it to "
                        "float16, bfloat16 or float32 first (for instance model.dequantize() in "
                        "transformers)"
                    )


def _header_files(model: ModelReference) -> Iterator[str]:
    path = Path(model.model.path)
    if path.is_file():
        candidates = [str(path)]
    else:
        from mergekit.io.tasks import LoaderCache

        loader = LoaderCache.loaders.get(model)
        if loader is None:
            return
        index = loader.index
        candidates = [os.path.join(index.base_path, shard.filename) for shard in index.shards]
    yield from (file for file in candidates if file.endswith(".safetensors"))
