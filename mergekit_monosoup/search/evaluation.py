"""Score a checkpoint by a command of the user's."""

from __future__ import annotations

import hashlib
import math
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_monosoup.errors import InputError, ParameterError

if TYPE_CHECKING:
    from mergekit.common import ModelReference

PLACEHOLDER = "{model}"


class Evaluation:
    """A command that scores the checkpoint in the folder `{model}` and prints the score last.

    It runs without a shell; for pipes, write `sh -c '...'`.
    """

    def __init__(self, command: str, option: str = "--eval") -> None:
        """Split the command as a shell would.

        Args:
            command: the command line.
            option: that gave it, for messages.

        Raises:
            ParameterError: it is not a command line, or has no `{model}`.
        """
        self.text, self.option = command, option
        try:
            self.arguments = shlex.split(command)
        except ValueError as error:
            raise ParameterError(f"{option} {command!r} is not a command line: {error}") from error
        if not any(PLACEHOLDER in argument for argument in self.arguments):
            raise ParameterError(
                f"{option} {command!r} does not say where the checkpoint goes; write {PLACEHOLDER}"
            )

    def digest(self) -> str:
        """Return a digest of the command and of the files that its arguments name."""
        total = hashlib.sha256()
        for argument in self.arguments:
            path = Path(argument)
            total.update(_tagged(b"argument", argument.encode()))
            if path.is_file():
                total.update(_tagged(b"file", _digest_of_file(path)))
        return total.hexdigest()

    def score(self, folder: Path) -> float:
        """Run the command on a checkpoint and return the number that it prints last.

        What it writes to standard error goes to the terminal.

        Raises:
            InputError: it cannot be run, fails, or prints no finite number last.
        """
        arguments = [argument.replace(PLACEHOLDER, str(folder)) for argument in self.arguments]
        line = shlex.join(arguments)
        try:
            done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
        except OSError as error:
            raise InputError(f"cannot run {line}: {error}") from error
        if done.returncode != 0:
            raise InputError(f"{line} ended with status {done.returncode}\n{_tail(done.stdout)}")
        last = (done.stdout.split() or [""])[-1]
        try:
            score = float(last)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise InputError(f"{line} must print its score last, a finite number, not {last!r}")
        return score


def digest_of_checkpoint(folder: Path) -> str:
    """Return a digest of all files of a checkpoint but hidden ones and its card."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.name != "README.md":
            total.update(_tagged(name.as_posix().encode(), _digest_of_file(path)))
    return total.hexdigest()


def digest_of_model(reference: ModelReference, cache: str | None) -> str:
    """Return a digest of the files of a model, those of its adapter too; downloads it where it is remote.

    Args:
        reference: as mergekit reads it from a recipe.
        cache: folder of the Hub's cache.
    """
    from mergekit.common import ModelReference

    models = [reference.model] if reference.lora is None else [reference.model, reference.lora]
    folders = [Path(ModelReference(model=model).local_path(cache_dir=cache)).resolve() for model in models]
    return "+".join(digest_of_checkpoint(folder) for folder in folders)


def _digest_of_file(path: Path) -> bytes:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.digest()


def _tagged(tag: bytes, content: bytes) -> bytes:
    # Lengths first: no two different lists run together to the same bytes.
    return b"%d %d " % (len(tag), len(content)) + tag + content


def _tail(output: str, lines: int = 10) -> str:
    return "\n".join(output.splitlines()[-lines:])
