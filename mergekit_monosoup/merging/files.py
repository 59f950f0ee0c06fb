"""Bring the files beside the weights from the checkpoint that the result is one of."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.companions import (
    companions,
    is_tokenizer,
    wanted_of,
)
from mergekit_monosoup.checkpoint.headers import read_config, read_folder
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.merging.configuration import write_config, written_config

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The folder that files come from, and one whose tokenizer goes before its own (an adapter's)."""

    folder: Path
    adapter: Path | None = None
    skip: frozenset[str] = field(default_factory=frozenset)


def source_of(model: ModelReference, options: MergeOptions) -> Source:
    """Return where the files of a model lie; of the Hub's, only these files are asked for.

    Raises:
        InputError: the model is neither here nor on the Hub.
    """
    folder = _fetched(model.model.path, model.model.revision, options.transformers_cache)
    adapter = None
    if model.lora is not None:
        adapter = _fetched(model.lora.path, model.lora.revision, options.transformers_cache)
    return Source(folder, adapter)


def _fetched(path: str, revision: str | None, cache: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        names = huggingface_hub.list_repo_files(path, revision=revision)
        return Path(
            huggingface_hub.snapshot_download(
                path, revision=revision, cache_dir=cache, allow_patterns=wanted_of(names)
            )
        )
    except (OfflineModeIsEnabled, ConnectionError):
        # What the merge itself has read lies in the cache.
        return Path(
            huggingface_hub.snapshot_download(path, revision=revision, cache_dir=cache, local_files_only=True)
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"the files of {path} cannot be had ({error}); name a folder by --files-from"
        ) from error


def bring_files(
    source: Source, out: Path, *, own_tokenizer: bool = False, copy_tokenizer: bool = True
) -> list[str]:
    """Copy the files that go with a model, byte for byte; nothing is loaded, no code is run.

    Args:
        source: where they come from.
        out: the folder of the result; what lies there is replaced.
        own_tokenizer: the result has a tokenizer of its own already.
        copy_tokenizer: False leaves tokenizer files behind.

    Returns:
        The names of the files.
    """
    found = companions(source.folder)
    taken = {name: source.folder / name for name in found.taken if name != "config.json"}
    for name, why in found.left.items():
        if why.startswith(("larger", "a link")):
            LOG.warning("%s of %s is left behind: %s", name, source.folder.name, why)
    if source.adapter is not None:
        taken |= {
            name: source.adapter / name for name in companions(source.adapter).taken if is_tokenizer(name)
        }
    if own_tokenizer or not copy_tokenizer:
        taken = {name: path for name, path in taken.items() if not is_tokenizer(name)}
    for name, path in sorted(taken.items()):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
    return sorted(taken)


def complete(
    folder: str | Path,
    source: str | Path,
    *,
    layers: Mapping[str, int] | None = None,
    options: MergeOptions | None = None,
    own_tokenizer: bool = False,
    equal: Callable[[str, str], bool] | None = None,
) -> list[str]:
    """Give a merged model the files of the fine-tuned checkpoint: what stock mergekit takes from the base.

    Configuration (put right where the written weights differ), generation settings, tokenizer and chat
    template, processors, code, modules; see `checkpoint.companions` for what is left behind.

    Args:
        folder: the merged model; its weights stay as they are.
        source: the fine-tuned checkpoint, a folder or Hub id (`base+adapter` too).
        layers: numbers of layers that the merge has changed, by their keys in config.json.
        options: mergekit's own, for where the Hub's cache lies and whether tokenizers are copied.
        own_tokenizer: the merged model has a tokenizer of its own.
        equal: whether two tensors of the merged model are the same; read from the files where absent.

    Returns:
        The names of the files that were brought.

    Raises:
        InputError: one of the two is not a model.
    """
    out = Path(folder)
    options = options or MergeOptions()
    found = source_of(ModelReference.parse(str(source)), options)
    names = bring_files(found, out, own_tokenizer=own_tokenizer, copy_tokenizer=options.copy_tokenizer)
    config = read_config(found.folder)
    written = _tensors(out)
    before = _tensors(found.folder)
    same = equal or _equal_in(out, written)
    put_right = written_config(config, written, before, equal=same, layers=layers)
    if "quantization_config" in config:
        LOG.warning("the merged weights are not quantised: config.json is without quantization_config")
    write_config(out / "config.json", (found.folder / "config.json").read_bytes(), config, put_right)
    return [*names, "config.json"]


def _tensors(folder: Path) -> Mapping[str, Any]:
    """Return the headers of a folder's weights; none where only its other files are here."""
    try:
        # A folder under way has no configuration yet.
        return read_folder(str(folder), folder, with_config=False).tensors
    except InputError:
        return {}


def _equal_in(folder: Path, written: Mapping[str, Any]) -> Callable[[str, str], bool]:
    def equal(one: str, other: str) -> bool:
        a, b = written[one], written[other]
        if a.shape != b.shape or a.dtype != b.dtype or a.begin is None or b.begin is None:
            return False
        from mergekit_monosoup.checkpoint.headers import bytes_per_entry
        from mergekit_monosoup.merging.writer import hash_range

        size = int(a.size * bytes_per_entry(a.dtype))
        hashes = [hash_range(folder / t.file, t.begin, t.begin + size) for t in (a, b)]
        return hashes[0] == hashes[1]

    return equal


def files_model(config: MergeConfiguration, wanted: str | None) -> ModelReference:
    """Return the model that the files of a merge come from.

    The first fine-tuned one of the recipe; `base` or a model's name chooses another.

    Raises:
        InputError: the recipe has no base.
    """
    from mergekit_monosoup.merging.prepared import finetuned_models

    if wanted == "base":
        if config.base_model is None:
            raise InputError("--files-from base: the recipe names no base_model; name a model")
        return config.base_model
    if wanted is not None:
        return ModelReference.parse(wanted)
    return next(iter(finetuned_models(config)), config.base_model or config.referenced_models()[0])


def changed_layers(config: MergeConfiguration, arch: Any, out_config: Any) -> dict[str, int]:
    """Return the numbers of layers that a recipe of slices gives the output, by their keys."""
    if not (config.slices or config.modules):
        return {}
    return host.layer_counts(arch, out_config)


def set_chat_template(folder: Path, template: str) -> None:
    """Give a folder's tokenizer a chat template, leaving its other files as they are."""
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    if file.is_file():
        content = json.loads(file.read_text("utf-8"))
        if content.pop("chat_template", None) is not None:
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
