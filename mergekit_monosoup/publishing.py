"""Check a merged model's folder and upload it to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_monosoup.checkpoint.adapter_folder import is_adapter
from mergekit_monosoup.checkpoint.hub import connection_errors
from mergekit_monosoup.checkpoint.output import PARTIAL
from mergekit_monosoup.errors import InputError, MonoSoupError
from mergekit_monosoup.merging.published_adapter import check_adapter
from mergekit_monosoup.merging.verify import verify_folder

# What a merge, an editor or the Hub's client leaves beside a model.
IGNORED = (f"{PARTIAL}/**", ".cache/**", "**/__pycache__/**", "*.tmp", ".DS_Store", "**/.DS_Store")


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
    """Check that a model or adapter is whole, and that nothing outside it would be uploaded with it.

    Args:
        folder: of the model.
        seen: called for each tensor that is checked, with its name and number of bytes.

    Raises:
        InputError: something is missing or damaged; names all of it.
    """
    found = check_adapter(folder, seen) if is_adapter(folder) else verify_folder(folder, seen=seen)
    files = _files(folder)
    root = folder.resolve()
    for name in files:
        if not (folder / name).resolve().is_relative_to(root):
            found.problems.append(f"{folder / name} is a link out of the folder; put the file itself there")
    if found.problems:
        raise InputError("\n  ".join(found.problems))
    size = sum((folder / name).stat().st_size for name in files)
    return CheckedFolder(found.tensors, found.parameters, size, files)


def _files(folder: Path) -> tuple[str, ...]:
    from huggingface_hub.utils._paths import filter_repo_objects

    every = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    return tuple(filter_repo_objects(every, ignore_patterns=list(IGNORED)))


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
    expected: tuple[type[Exception], ...] = (RuntimeError, *connection_errors())
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
        if isinstance(error, connection_errors()):
            return error
        error = error.__cause__ or error.__context__
    return None
