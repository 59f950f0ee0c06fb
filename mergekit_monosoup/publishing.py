"""Check a merged model's folder and upload it to the Hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mergekit_monosoup.checkpoint.adapter_folder import is_adapter
from mergekit_monosoup.checkpoint.headers import (
    StoredTensor,
    read_folder,
    read_index,
    read_safetensors_header,
)
from mergekit_monosoup.checkpoint.output import PARTIAL
from mergekit_monosoup.errors import InputError, MonoSoupError, NonFiniteError
from mergekit_monosoup.lora.publishable import check_adapter
from mergekit_monosoup.merging.folder import LEFTOVERS

# What a merge, an editor or the Hub's client leaves beside a model.
IGNORED = (*LEFTOVERS, ".cache/**", "**/__pycache__/**", "*.tmp", ".DS_Store", "**/.DS_Store")

_TRANSPORTS = (("httpx", "TransportError"), ("httpx2", "TransportError"), ("requests", "ConnectionError"))


class PublishingError(MonoSoupError):
    """The Hub refuses an upload, or cannot be reached."""


@dataclass(frozen=True)
class CheckedFolder:
    """A model that is fit to be uploaded."""

    tensors: int
    parameters: int
    bytes: int
    files: tuple[str, ...]


def check_folder(folder: Path, seen: Callable[[str, int], None] = lambda name, size: None) -> CheckedFolder:
    """Check that a model or adapter is whole: configuration, index, every tensor present and finite.

    Args:
        folder: of the model.
        seen: called for each tensor that is checked, with its name and number of entries.

    Raises:
        InputError: a file or tensor is missing or damaged; names it.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the output of a merge")
    if is_adapter(folder):
        return _checked(folder, check_adapter(folder, seen).tensors.values())
    if folder.name.endswith(PARTIAL):
        raise InputError(f"{folder} is an unfinished merge; go on with it by --resume")
    checkpoint = read_folder(str(folder), folder)
    _check_config(folder)
    _check_stray(folder, {tensor.file for tensor in checkpoint.tensors.values()})
    if not checkpoint.tensors:
        raise InputError(f"{folder} holds no tensors; run the merge again")
    by_file: dict[str, list[StoredTensor]] = {}
    for tensor in checkpoint.tensors.values():
        by_file.setdefault(tensor.file, []).append(tensor)
    for file, tensors in sorted(by_file.items()):
        if not file.endswith(".safetensors"):
            raise InputError(f"{folder / file} is pickled; only safetensors files are uploaded: merge again")
        _check_values(folder / file, tensors, seen)
    return _checked(folder, checkpoint.tensors.values())


def _checked(folder: Path, tensors: Collection[StoredTensor]) -> CheckedFolder:
    files = _files(folder)
    size = sum((folder / name).stat().st_size for name in files)
    return CheckedFolder(len(tensors), sum(tensor.size for tensor in tensors), size, files)


def _files(folder: Path) -> tuple[str, ...]:
    from huggingface_hub.utils._paths import filter_repo_objects

    every = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    return tuple(filter_repo_objects(every, ignore_patterns=list(IGNORED)))


def _check_config(folder: Path) -> None:
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be loaded by transformers: {error}") from error


def _check_stray(folder: Path, named: set[str]) -> None:
    """Refuse shards that the index does not name: a half-replaced model."""
    stray = sorted(
        file.name
        for file in folder.glob("*.safetensors")
        if file.name not in named and file.name.startswith("model")
    )
    if stray:
        raise InputError(f"{folder / stray[0]} is not in the index; remove it if it is of another merge")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    placed = read_index(index)
    for name in sorted(set(placed.values())):
        listed = {tensor for tensor, file in placed.items() if file == name}
        extra = set(read_safetensors_header(folder / name)) - listed
        if extra:
            raise InputError(f"{index} does not list tensor {min(extra)} of {name}; run the merge again")


def _check_values(file: Path, tensors: list[StoredTensor], seen: Callable[[str, int], None]) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            for stored in tensors:
                tensor = opened.get_tensor(stored.name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    raise NonFiniteError(
                        f"tensor {stored.name} in {file} holds NaN or infinity; nobody could use this model"
                    )
                seen(stored.name, stored.size)
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read ({error}); run the merge again") from error


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Upload a checked folder and return the address of the commit or pull request.

    Run again after a lost connection, it goes on where it was: the Hub keeps files that have arrived
    whole (and, with hf_xet, chunks of the others), and the client does not send them again.

    Raises:
        PublishingError: no access, no connection, or another refusal of the Hub.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = huggingface_hub.HfApi()
    expected: tuple[type[Exception], ...] = (RuntimeError, *_connection_errors())
    try:
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and revision != "main" and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr or None,
            commit_message=message or "Upload merged model",
            ignore_patterns=list(IGNORED),
        )
    except HFValidationError as error:
        raise PublishingError(f"{repo_id!r} is not a repository id; write user/name") from error
    except OfflineModeIsEnabled as error:
        raise PublishingError("the Hub's client is set to offline mode; unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        raise PublishingError(_refusal(repo_id, error)) from error
    except expected as error:
        broken = _lost_connection(error)
        if broken is None:
            raise
        raise PublishingError(
            f"the connection to the Hub broke ({type(broken).__name__}: {broken}); run the same command "
            "again: files that have arrived are not sent again"
        ) from error
    return str(commit.pr_url or commit.commit_url)


def _refusal(repo_id: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"the Hub refuses to write to {repo_id} ({status}); log in with `hf auth login`, with a token "
            "that may write there"
        )
    if status == 404:
        return f"the Hub has no repository {repo_id} to open a pull request on; leave out --create-pr"
    if status is not None and status >= 500:
        return f"the Hub has a problem of its own ({status}); run the same command again later"
    return f"the Hub refuses the upload to {repo_id}: {error}"


def _lost_connection(error: BaseException | None) -> BaseException | None:
    """Return the broken connection behind an error; the client wraps those of single files."""
    while error is not None:
        if isinstance(error, _connection_errors()):
            return error
        error = error.__cause__ or error.__context__
    return None


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return what a broken connection raises; the client's HTTP library changes with its releases."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError]
    for library, name in _TRANSPORTS:
        if importlib.util.find_spec(library) is not None:
            found.append(getattr(importlib.import_module(library), name))
    return tuple(found)
