"""Headers of checkpoints on the Hub: by range requests, or from the local cache."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mergekit_monosoup.checkpoint.companions import is_taken, modules_in
from mergekit_monosoup.checkpoint.headers import DTYPES, Checkpoint, StoredTensor, read_folder
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
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        try:
            return _fetch(repo, revision, cache)
        except connection_errors():
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, cache_dir=cache, local_files_only=True
                )
            )
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


def read_hub(name: str, repo: str, revision: str | None) -> Checkpoint:
    """Return configuration and headers of a Hub repository; downloads config.json and headers only.

    Raises:
        InputError: no such repository or revision, no access, or no connection.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        cached = _cached(name, repo, revision)
        if cached is not None:
            return cached
        file = huggingface_hub.hf_hub_download(repo, "config.json", revision=revision)
        config = json.loads(Path(file).read_text("utf-8"))
        commit = cached_revision(Path(file).parent)
        try:
            metadata = huggingface_hub.HfApi().get_safetensors_metadata(repo, revision=commit or revision)
        except NotASafetensorsRepoError:
            note = f"{name} has no safetensors files; shapes are unknown until the download"
            return Checkpoint(name, config, {}, None, commit, shapes_known=False, notes=(note,))
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
        raise InputError(
            f"model {name} has no config.json on the Hub; is it a transformers model?"
        ) from error
    except HFValidationError as error:
        raise InputError(f"model {name} is neither a folder here nor a valid Hub id") from error
    except (HfHubHTTPError, SafetensorsParsingError, ValueError) as error:
        raise InputError(f"the Hub's answer about model {name} cannot be used: {error}") from error
    return Checkpoint(name, config, _tensors(metadata), None, commit)


def _tensors(metadata: Any) -> dict[str, StoredTensor]:
    return {
        key: StoredTensor(key, tuple(entry.shape), DTYPES.get(entry.dtype, (entry.dtype.lower(), 0))[0], file)
        for file, header in metadata.files_metadata.items()
        for key, entry in header.tensors.items()
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
