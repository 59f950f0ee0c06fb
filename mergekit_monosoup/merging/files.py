"""Bring the files beside the weights from the checkpoint that the result is one of."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.tokenizer import TokenizerInfo

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.companions import companions, is_tokenizer
from mergekit_monosoup.checkpoint.headers import StoredTensor, bytes_per_entry, read_config, read_folder
from mergekit_monosoup.checkpoint.hub import fetch_companions
from mergekit_monosoup.errors import ConfigurationError, InputError, OutputError
from mergekit_monosoup.merging.configuration import Tensors, write_config, written_config
from mergekit_monosoup.merging.layer_settings import layers_key
from mergekit_monosoup.merging.tokenizers import renumber, set_chat_template, tokenizer_files

LOG = logging.getLogger(__name__)

_PIECE = 1 << 22


@dataclass(frozen=True)
class Source:
    """Where the files of a result come from.

    Args:
        model: as the recipe or the command names it.
        folder: of the checkpoint.
        adapter: of an adapter on it, whose tokenizer goes before the checkpoint's.
        stand_in: of the base, whose tokenizer serves where the checkpoint has none.
    """

    model: str
    folder: Path
    adapter: Path | None = None
    stand_in: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders whose word counts, the first one most."""
        return (self.folder,) if self.adapter is None else (self.adapter, self.folder)


def files_model(config: MergeConfiguration, wanted: str | None = None) -> ModelReference:
    """Return the model that the files of a merge come from.

    Args:
        config: the recipe.
        wanted: `base`, a model of the recipe, or another folder or Hub id; absent: the first model of the
            recipe besides its base.

    Raises:
        ConfigurationError: there is no such model.
    """
    from mergekit_monosoup.merging.opened import finetuned_models

    if wanted == "base":
        if config.base_model is None:
            raise ConfigurationError("--files-from base: the recipe names no base_model; name a model")
        return config.base_model
    if wanted is not None:
        return reference_to(wanted)
    first = next(iter(finetuned_models(config)), config.base_model)
    return first if first is not None else config.referenced_models()[0]


def reference_to(model: str) -> ModelReference:
    """Read what a user names: a folder, a Hub id, or one of them with an adapter.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        return host.local_reference(model) if Path(model).is_dir() else ModelReference.parse(model)
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(f"{model!r} is neither a folder nor the id of a model ({error})") from error


def source_of(model: ModelReference, options: MergeOptions, base: ModelReference | None = None) -> Source:
    """Return where the files of a model lie; of the Hub's, only these files are asked for.

    Args:
        model: the fine-tuned checkpoint.
        options: mergekit's own, for where the Hub's cache lies.
        base: whose tokenizer serves where the checkpoint has none.

    Raises:
        InputError: the model is neither here nor on the Hub.
    """

    def folder(path: ModelPath) -> Path:
        if Path(path.path).is_dir():
            return Path(path.path)
        return fetch_companions(path.path, path.revision, options.transformers_cache)

    return Source(
        str(model),
        folder(model.model),
        folder(model.lora) if model.lora is not None else None,
        folder(base.model) if base is not None and base.model != model.model else None,
    )


def write_beside(
    out: Path,
    source: Source,
    config: MergeConfiguration,
    arch: ModelArchitecture,
    options: MergeOptions,
    tokenizer: TokenizerInfo | None,
    described_by: Path | None = None,
) -> None:
    """Write all that lies beside the merged weights but the card: configuration, tokenizer and the rest.

    Args:
        out: folder of the result, which holds its weights.
        source: where the files come from.
        config, arch, options: of the merge.
        tokenizer: what the recipe's own `tokenizer:` has made.
        described_by: folder of the checkpoint whose config.json describes the result, where it is another.
    """
    own = tokenizer is not None
    brought = bring_files(
        source, out, own_tokenizer=own, copy_tokenizer=options.copy_tokenizer, beneath=described_by
    )
    described = described_by or source.folder
    layers = layer_sources(config, _layer_keys(arch, read_config(described)))
    put_config_right(described, out, layers=layers, before=tensors_in(described))
    if tokenizer is not None:
        host.save_tokenizer(config, tokenizer, str(out))
        renumber(out, source.folder / "tokenizer.json", tokenizer)
    elif options.copy_tokenizer and (template := host.chat_template(config)) is not None:
        if not any(map(is_tokenizer, brought)):
            LOG.warning("the result has no tokenizer to give the recipe's chat template to")
        set_chat_template(out, template)


def bring_files(
    source: Source,
    out: Path,
    *,
    own_tokenizer: bool = False,
    copy_tokenizer: bool = True,
    beneath: Path | None = None,
) -> list[str]:
    """Copy the files that go with a model, byte for byte; nothing is loaded, no code is run.

    Args:
        source: where they come from.
        out: the folder of the result; what lies there is replaced. Its config.json is not touched.
        own_tokenizer: the result has a tokenizer of its own already.
        copy_tokenizer: False leaves tokenizer files behind.
        beneath: folder of the base where the result has parts that the source lacks (a vision tower): what
            else these need is taken from there, such as a processor.

    Returns:
        The names of the files.

    Raises:
        OutputError: a file cannot be copied.
    """
    found = companions(source.folder)
    for name in found.unusual:
        LOG.warning("%s of %s is left behind: %s", name, source.model, found.left[name])
    for name, why in found.left.items():
        LOG.info("%s of %s is left behind (%s)", name, source.model, why)
    taken = {
        name: folder / name
        for folder in (beneath, source.folder)
        if folder is not None
        for name in (found.taken if folder is source.folder else companions(folder).taken)
        if name != "config.json" and not is_tokenizer(name)
    }
    if copy_tokenizer and not own_tokenizer:
        stand_in = (source.stand_in,) if source.stand_in is not None else ()
        tokenizer = tokenizer_files((*source.folders, *stand_in))
        taken |= tokenizer
        if stand_in and stand_in[0] in {file.parent for file in tokenizer.values()}:
            LOG.warning("%s has no tokenizer; the result has that of the base", source.model)
    for name, path in sorted(taken.items()):
        _copy(path, out / name)
    return sorted(taken)


def _copy(path: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    except OSError as error:
        raise OutputError(f"{path} cannot be copied to {target} ({error.strerror or error})") from error


def put_config_right(
    source: Path, out: Path, *, before: Tensors, layers: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Write config.json: that of the source, true of the weights in `out`.

    Args:
        source: folder of the checkpoint.
        out: folder of the result.
        before: the tensors of the checkpoint; empty where they are not known.
        layers: see `written_config`.
    """
    content = read_config(source)
    written = tensors_in(out)
    right = written_config(content, written, before, equal=_equal_in(out, written), layers=layers)
    if content.get("quantization_config") and "quantization_config" not in right:
        LOG.warning("the merged weights are not quantised: config.json is without quantization_config")
    write_config(out / "config.json", (source / "config.json").read_bytes(), content, right)


def _layer_keys(arch: ModelArchitecture, content: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the key of the number of layers of each module; what mergekit infers itself has none."""
    keys = {}
    for name, module in arch.modules.items():
        known = module.architecture
        count = getattr(getattr(known, "definition", None), "override_num_layers", None)
        keys[name] = known.num_layers_config_key() or layers_key(content, name, count)
    return keys


def layer_sources(config: MergeConfiguration, keys: Mapping[str, str | None]) -> dict[str, list[int]]:
    """Return from which layer each layer of the result is, where a recipe of slices says so.

    Args:
        config: the recipe.
        keys: the key of the number of layers in config.json, by the modules of the architecture.
    """
    found = {}
    for module, key in keys.items():
        owner = (config.modules or {}).get(module)
        slices = owner.slices if owner is not None else config.slices
        if slices and not key:
            LOG.warning("config.json says nowhere how many layers %s has; put it right by hand", module)
        if key and slices:
            found[key] = [i for part in slices for i in range(*part.sources[0].layer_range)]
    return found


def tensors_in(folder: Path) -> Tensors:
    """Return the headers of a folder's weights; none where only its other files are here."""
    try:
        # A folder under way has no configuration yet.
        return read_folder(str(folder), folder, with_config=False).tensors
    except InputError:
        return {}


def _equal_in(folder: Path, written: Tensors) -> Callable[[str, str], bool]:
    def content(tensor: StoredTensor, begin: int, length: int) -> bytes:
        with (folder / tensor.file).open("rb") as stream:
            stream.seek((tensor.begin or 0) + begin)
            return stream.read(length)

    def equal(one: str, other: str) -> bool:
        a, b = written[one], written[other]
        if a.shape != b.shape or a.dtype != b.dtype or a.begin is None or b.begin is None:
            return False
        size = int(a.size * bytes_per_entry(a.dtype))
        return all(
            content(a, begin, min(_PIECE, size - begin)) == content(b, begin, min(_PIECE, size - begin))
            for begin in range(0, size, _PIECE)
        )

    return equal
