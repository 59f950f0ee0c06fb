"""mergekit's cache of merged adapters, made safe: a folder counts only when it says that it is whole.

mergekit 0.1.5 takes any existing folder for a finished merge, and names it after model and adapter alone:
an interrupted merge, another dtype or a retrained adapter go unnoticed. Here each folder is built beside
its place, gets a marker that says what it was built from, and is moved in when it is complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mergekit
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from mergekit_monosoup.checkpoint.pinned import source_of
from mergekit_monosoup.errors import UnsupportedAdapterError
from mergekit_monosoup.lora.adapter import read_adapter
from mergekit_monosoup.lora.by_peft import merged_by_peft, with_peft_names

LOG = logging.getLogger(__name__)

MARKER = "mergekit-monosoup-lora.json"


def prepare_lora_cache(references: Sequence[ModelReference], options: MergeOptions) -> None:
    """Have peft merge adapters into the cache of the options, so that mergekit finds whole folders.

    Folders that are incomplete, of another dtype, of another version of the adapter or without a marker
    are built again, and a warning says why.

    Raises:
        AdapterError: an adapter is damaged, or does not fit its base.
    """
    for reference in sorted(references, key=str):
        _prepare(reference, options)


def _prepare(reference: ModelReference, options: MergeOptions) -> None:
    if reference.lora is None or options.lora_merge_cache is None:
        return
    cache = Path(options.lora_merge_cache)
    place = cache / f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    wanted = _marker(reference, options)
    if place.exists():
        reason = _why_not(place, wanted)
        if reason is None:
            return
        LOG.warning("LoRA cache %s %s; merging %s again", place, reason, reference)
    _check(reference, options.trust_remote_code)
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".merging-", dir=cache))
    try:
        built = merged_by_peft(
            with_peft_names(reference, staging / "adapter"),
            staging / "merged",
            trust_remote_code=options.trust_remote_code,
            dtype=options.lora_merge_dtype,
        )
        (built / MARKER).write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n", "utf-8")
        if place.exists():
            shutil.rmtree(place)
        os.replace(built, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check(reference: ModelReference, trust_remote_code: bool) -> None:
    """Refuse a damaged adapter, or one of another base, which peft would merge in part and in silence."""
    try:
        adapter = read_adapter(source_of(reference.lora))
    except UnsupportedAdapterError:
        # Not linear: peft merges it, and the method says what it takes.
        return
    from mergekit_monosoup.lora import hollow

    try:
        hollow.place(reference, adapter, trust_remote_code)
    except UnsupportedAdapterError:
        return


def _marker(reference: ModelReference, options: MergeOptions) -> dict[str, Any]:
    return {
        "adapter": str(reference.lora),
        "adapter_files": _stamps(reference.lora, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)),
        "base": str(reference.model),
        "base_files": _stamps(reference.model, ("config.json",)),
        "dtype": options.lora_merge_dtype,
        "mergekit": getattr(mergekit, "__version__", None),
    }


def _stamps(path: ModelPath | None, names: tuple[str, ...]) -> dict[str, list[int]]:
    """Return size and time of change of local files; what lies on the Hub is told apart by its revision."""
    folder = Path(path.path) if path is not None else Path()
    weights = sorted(f.name for f in folder.glob("*.safetensors")) if folder.is_dir() else []
    files = [folder / name for name in dict.fromkeys((*names, *weights))]
    return {
        f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files if folder.is_dir() and f.is_file()
    }


def _why_not(place: Path, wanted: dict[str, Any]) -> str | None:
    """Return why a folder cannot be used, or None where it can."""
    try:
        found = json.loads((place / MARKER).read_text("utf-8"))
    except FileNotFoundError:
        return "has no marker of a finished merge"
    except (OSError, ValueError):
        return "has a damaged marker"
    if not isinstance(found, dict):
        return "has a damaged marker"
    for key, what in (("dtype", "dtype"), ("adapter_files", "adapter"), ("base_files", "base")):
        if found.get(key) != wanted[key]:
            return f"was merged from another {what}"
    if found != wanted:
        return "was merged from something else"
    return _incomplete(place)


def _incomplete(place: Path) -> str | None:
    index = place / "model.safetensors.index.json"
    try:
        names = {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        if not (place / "config.json").is_file():
            return "lacks config.json"
        for name in sorted(names):
            with safe_open(place / name, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"is incomplete ({error})"
    return None
