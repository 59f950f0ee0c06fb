"""Headers of checkpoints on the Hub: by range requests, or from the local cache."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mergekit_monosoup.checkpoint.adapter_folder import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    AdapterFolder,
    read_adapter_config,
)
from mergekit_monosoup.checkpoint.companions import (
    is_taken,
    is_tokenizer,
    modules_in,
    patterns_left_behind,
)
from mergekit_monosoup.checkpoint.headers import Checkpoint, StoredTensor, read_config, read_folder
from mergekit_monosoup.checkpoint.ranges import RemoteWeights
from mergekit_monosoup.checkpoint.safetensors_file import MOST_TENSORS, checked_entries
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.report.inputs import cached_revision

LOG = logging.getLogger(__name__)

_TRANSPORTS = (("httpx", "TransportError"), ("httpx2", "TransportError"), ("requests", "ConnectionError"))


def connection_errors() -> tuple[type[Exception], ...]:
    """Return what a broken connection raises; the client's HTTP library changes with its releases."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError]
    for library, name in _TRANSPORTS:
        if importlib.util.find_spec(library) is not None:
            found.append(getattr(importlib.import_module(library), name))
    return tuple(found)


def fetch_companions(repo: str, revision: str | None, cache: str | None = None) -> Path:
    """Download the files that go with a model or adapter, no weights but modules'; return their folder.

    Off the network, what lies in the Hub's cache serves.

    Args:
        repo: id on the Hub.
        revision: of the repository.
        cache: folder of the Hub's cache, where it is not the usual one.

    Raises:
        InputError: no such repository, no access, or nothing in the cache.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        try:
            return _fetch(repo, revision, cache)
        except connection_errors():
            return _cached_folder(repo, revision, cache)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"the files of {repo} cannot be had from the Hub ({error}); check the spelling, or name a folder"
        ) from error


def _fetch(repo: str, revision: str | None, cache: str | None) -> Path:
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    for name, size in sizes.items():
        if is_taken(name) and not is_taken(name, size):
            LOG.warning("%s of %s is left behind: it is large", name, repo)
    wanted = [name for name, size in sizes.items() if is_taken(name, size) or name == "README.md"]
    if not sizes.keys() & {"config.json", CONFIG}:
        raise InputError(f"model {repo} has no config.json on the Hub; is it a transformers model?")
    return _download(repo, info.sha, wanted, list(sizes), cache)


def _fetch_for_plan(repo: str, commit: str | None) -> Path:
    """Download what a plan judges a model by beside its headers: tokenizer, card, modules."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(repo, revision=commit)
    names = [file.rfilename for file in info.siblings or ()]
    wanted = [n for n in names if is_tokenizer(n) or n in ("config.json", "README.md", "modules.json")]
    return _download(repo, info.sha, wanted, names, None)


def _download(
    repo: str, commit: str | None, wanted: Sequence[str], names: Sequence[str], cache: str | None
) -> Path:
    """Download files of a repository and the weights of its modules; return their folder."""
    import huggingface_hub

    def get(name: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=commit, cache_dir=cache))

    wanted = list(wanted)
    if "modules.json" in names:
        # Weights of modules are few, and merged in their place.
        modules = modules_in(json.loads(get("modules.json").read_text("utf-8")))
        parents = {name: PurePosixPath(name).parent for name in names}
        held = [n for n in names if any(parents[n].is_relative_to(module) for module in modules)]
        safe = [n for n in held if PurePosixPath(n).name == "model.safetensors"]
        pickled = [n for n in held if PurePosixPath(n).name == "pytorch_model.bin"]
        wanted += safe + [n for n in pickled if parents[n] not in {parents[s] for s in safe}]
    for name in wanted:
        get(name)
    return get("config.json" if "config.json" in names else CONFIG).parent


def _cached_folder(repo: str, revision: str | None, cache: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            local_files_only=True,
            ignore_patterns=patterns_left_behind(),
        )
    except LocalEntryNotFoundError as error:
        known = (
            huggingface_hub.try_to_load_from_cache(repo, name, cache, revision)
            for name in ("config.json", CONFIG)
        )
        config = next((file for file in known if isinstance(file, str)), None)
        if config is None:
            raise
        LOG.warning("the Hub cannot be reached, and its cache may lack files of %s (%s)", repo, error)
        return Path(config).parent
    return Path(found)


def read_hub(name: str, repo: str, revision: str | None) -> Checkpoint:
    """Return configuration and headers of a Hub repository; downloads no weights but those of modules.

    Raises:
        InputError: no such repository or revision, no access, or no connection.
    """
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    with _said(name, revision, "config.json", "a transformers model"):
        cached = _cached(name, repo, revision)
        if cached is not None:
            return cached
        file = huggingface_hub.hf_hub_download(repo, "config.json", revision=revision)
        config = read_config(Path(file).parent)
        commit = cached_revision(Path(file).parent)
        fetched = _fetch_for_plan(repo, commit or revision)
        try:
            metadata = huggingface_hub.HfApi().get_safetensors_metadata(repo, revision=commit or revision)
        except NotASafetensorsRepoError:
            note = f"{name} has no safetensors files; shapes are unknown until the download"
            return Checkpoint(
                name, config, {}, None, commit, shapes_known=False, notes=(note,), fetched=fetched
            )
    remote = RemoteWeights(repo, commit or revision)
    return Checkpoint(name, config, _tensors(metadata), None, commit, fetched=fetched, remote=remote)


def cached_adapter(name: str) -> Path | None:
    """Return the folder of a Hub adapter in the local cache, None where its weights are not there.

    Downloads its configuration and nothing else.

    Args:
        name: its id, or id@revision.

    Raises:
        InputError: no such repository or revision, no access, or no connection.
    """
    import huggingface_hub

    repo, _, revision = name.partition("@")
    with _said(name, revision or None, CONFIG, "a PEFT adapter"):
        file = huggingface_hub.hf_hub_download(repo, CONFIG, revision=revision or None)
    folder = Path(file).parent
    return folder if any((folder / weights).is_file() for weights in (WEIGHTS, PICKLE)) else None


def adapter_on_hub(name: str) -> AdapterFolder | None:
    """Return an adapter by configuration and header; None where its weights are pickled.

    Args:
        name: its id, or id@revision.

    Raises:
        InputError: no such repository or revision, no access, or no connection.
        AdapterError: a value of the configuration has a type that no adapter has.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    repo, _, revision = name.partition("@")
    with _said(name, revision or None, CONFIG, "a PEFT adapter"):
        file = huggingface_hub.hf_hub_download(repo, CONFIG, revision=revision or None)
        config = read_adapter_config(name, Path(file).parent)
        try:
            header = huggingface_hub.HfApi().parse_safetensors_file_metadata(
                repo, WEIGHTS, revision=revision or None
            )
        except EntryNotFoundError:
            return None
        stored = _entries(header)
    tensors = {
        key: StoredTensor(key, entry.shape, entry.dtype, WEIGHTS, entry.begin)
        for key, entry in checked_entries(stored, WEIGHTS)[0].items()
    }
    return AdapterFolder(name, config, tensors)


@contextmanager
def _said(name: str, revision: str | None, file: str, what: str) -> Iterator[None]:
    """Say in our words what the Hub's client raises."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"model {name} is gated; accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"model {name} has no revision {revision!r} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"model {name} is neither a folder here nor a repository on the Hub that you may read; "
            "check the spelling, and for private repositories log in with `hf auth login`"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError) as error:
        raise InputError(
            f"model {name} is neither a folder here nor in the Hub's cache, and the Hub cannot be reached; "
            "check the path, or go online"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"model {name} has no {file} on the Hub; is it {what}?") from error
    except HFValidationError as error:
        raise InputError(f"model {name} is neither a folder here nor a valid Hub id") from error
    except (HfHubHTTPError, SafetensorsParsingError, ValueError) as error:
        raise InputError(f"the Hub's answer about model {name} cannot be used: {error}") from error
    except connection_errors() as error:
        raise InputError(f"the connection to the Hub broke while {name} was looked at: {error}") from error


def _tensors(metadata: Any) -> dict[str, StoredTensor]:
    """Hold the headers to what the format promises, as those of local files are.

    Raises:
        InputError: they do not keep it.
    """
    if sum(len(header.tensors) for header in metadata.files_metadata.values()) > MOST_TENSORS:
        raise InputError(f"the model holds more than {MOST_TENSORS:,} tensors, which are not read")
    tensors = {}
    for file, header in metadata.files_metadata.items():
        for name, checked in checked_entries(_entries(header), file)[0].items():
            tensors[name] = StoredTensor(name, checked.shape, checked.dtype, file, checked.begin)
    return tensors


def _entries(header: Any) -> dict[str, Any]:
    """Return a header as it is stored."""
    return {
        name: {"shape": entry.shape, "dtype": entry.dtype, "data_offsets": list(entry.data_offsets)}
        for name, entry in header.tensors.items()
    }


def _cached(name: str, repo: str, revision: str | None) -> Checkpoint | None:
    """Return a repository that lies in the local cache with its weights, None where it does not."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        return replace(read_folder(name, folder), revision=cached_revision(folder))
    except InputError:
        # Only a part of the repository is there; the Hub knows the rest.
        return None
