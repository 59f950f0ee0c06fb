"""Headers of checkpoints on the Hub: by range requests, or from the local cache."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mergekit_monosoup.checkpoint.adapter_folder import CONFIG, PICKLE, WEIGHTS
from mergekit_monosoup.checkpoint.companions import is_taken, modules_in, patterns_left_behind
from mergekit_monosoup.checkpoint.headers import Checkpoint, StoredTensor, read_config, read_folder
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
    """Download the files that go with a model, and weights of none but its modules; return their folder.

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

    def get(name: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=info.sha, cache_dir=cache))

    for name, size in sizes.items():
        if is_taken(name) and not is_taken(name, size):
            LOG.warning("%s of %s is left behind: it is large", name, repo)
    wanted = [name for name, size in sizes.items() if is_taken(name, size) or name == "README.md"]
    if "modules.json" in sizes:
        # Weights of modules are few, and merged in their place.
        modules = modules_in(json.loads(get("modules.json").read_text("utf-8")))
        parents = {name: PurePosixPath(name).parent for name in sizes}
        held = [n for n in sizes if any(parents[n].is_relative_to(module) for module in modules)]
        safe = [n for n in held if PurePosixPath(n).name == "model.safetensors"]
        pickled = [n for n in held if PurePosixPath(n).name == "pytorch_model.bin"]
        wanted += safe + [n for n in pickled if parents[n] not in {parents[s] for s in safe}]
    if "config.json" not in wanted:
        raise InputError(f"model {repo} has no config.json on the Hub; is it a transformers model?")
    for name in wanted:
        get(name)
    return get("config.json").parent


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
        config = huggingface_hub.try_to_load_from_cache(repo, "config.json", cache, revision)
        if not isinstance(config, str):
            raise
        LOG.warning("the Hub cannot be reached, and its cache may lack files of %s (%s)", repo, error)
        return Path(config).parent
    return Path(found)


def read_hub(name: str, repo: str, revision: str | None) -> Checkpoint:
    """Return configuration and headers of a Hub repository; downloads config.json and headers only.

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
        try:
            metadata = huggingface_hub.HfApi().get_safetensors_metadata(repo, revision=commit or revision)
        except NotASafetensorsRepoError:
            note = f"{name} has no safetensors files; shapes are unknown until the download"
            return Checkpoint(name, config, {}, None, commit, shapes_known=False, notes=(note,))
    return Checkpoint(name, config, _tensors(metadata), None, commit)


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


def _tensors(metadata: Any) -> dict[str, StoredTensor]:
    """Hold the headers to what the format promises, as those of local files are.

    Raises:
        InputError: they do not keep it.
    """
    if sum(len(header.tensors) for header in metadata.files_metadata.values()) > MOST_TENSORS:
        raise InputError(f"the model holds more than {MOST_TENSORS:,} tensors, which are not read")
    tensors = {}
    for file, header in metadata.files_metadata.items():
        stored = {
            name: {"shape": entry.shape, "dtype": entry.dtype, "data_offsets": list(entry.data_offsets)}
            for name, entry in header.tensors.items()
        }
        for name, checked in checked_entries(stored, file)[0].items():
            tensors[name] = StoredTensor(name, checked.shape, checked.dtype, file)
    return tensors


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
