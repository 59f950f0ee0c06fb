"""What makes a run the same run: its recipe, its inputs, the options that matter, the versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_monosoup import host
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.lora.adapted import adapted_loader
from mergekit_monosoup.merging.layout import Layout
from mergekit_monosoup.report.versions import versions

_OPTIONS = (
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "lora_merge_dtype",
    "device",
    "low_cpu_memory",
    "out_shard_size",
    "random_seed",
)
_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")

Stamps = dict[str, dict[str, list[int]]]


def fingerprint(recipe: str, options: MergeOptions, inputs: Stamps, layout: Layout) -> dict[str, Any]:
    """Return what a run that goes on with another must share with it.

    Args:
        recipe: the YAML text.
        options: of the command line.
        inputs: see `stamps`.
        layout: of the output.
    """
    digest = hashlib.sha256(b"".join(layout.headers[file] for file in sorted(layout.headers)))
    return {
        "recipe": recipe,
        "options": {name: getattr(options, name) for name in _OPTIONS},
        "version": versions(),
        "input": inputs,
        "layout": digest.hexdigest(),
    }


def stamps(models: Iterable[ModelReference]) -> Stamps:
    """Return size and time of change of the files of each checkpoint and adapter."""
    found: Stamps = {}
    for model in sorted(models, key=str):
        folders = []
        loader = host.loader_of(model)
        # A merged copy is made again by the next run, of the same base and adapter.
        if loader is not None and (model.lora is None or adapted_loader(loader) is not None):
            folders.append(Path(loader.index.base_path))
        if model.lora is not None:
            folders.append(Path(model.lora.path))
        found[str(model)] = {
            file.name: [file.stat().st_size, file.stat().st_mtime_ns]
            for folder in folders
            if folder.is_dir()
            for file in sorted(folder.iterdir())
            if file.suffix in _FILES and file.is_file()
        }
    return found


def check_unchanged(before: Stamps, models: Iterable[ModelReference]) -> None:
    """Refuse inputs that were changed while they were read.

    Raises:
        InputError: names the file.
    """
    now = stamps(models)
    for model, files in before.items():
        for name, stamp in files.items():
            if now.get(model, {}).get(name) != stamp:
                raise InputError(
                    f"{name} of {model} was changed while it was merged, so the result would be of neither; "
                    "begin again with --restart"
                )
