"""Score a checkpoint by a command of the user's."""

from __future__ import annotations

import hashlib
import math
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_monosoup.errors import InputError, ParameterError

if TYPE_CHECKING:
    from mergekit.common import ModelReference

PLACEHOLDER = "{model}"


@dataclass(frozen=True)
class Measured:
    """A score, and those of single items where it is their mean."""

    value: float
    items: tuple[float, ...] = ()

    @classmethod
    def of_items(cls, items: Sequence[float], source: str) -> Measured:
        """Return the mean of items.

        Raises:
            InputError: there are fewer than two, or one is not finite.
        """
        if len(items) < 2 or not all(map(math.isfinite, items)):
            raise InputError(
                f"{source} must give the finite score of each of at least two items, one a line, for "
                f"--per-item; it gave {len(items)} numbers"
            )
        return cls(math.fsum(items) / len(items), tuple(items))


class Evaluation:
    """A command that scores the checkpoint in the folder `{model}` and prints the score last.

    With `per_item`, it prints a score an item, each last in its line, and the score is their mean.

    It runs without a shell; for pipes, write `sh -c '...'`.
    """

    def __init__(self, command: str, option: str = "--eval", per_item: bool = False) -> None:
        """Split the command as a shell would.

        Args:
            command: the command line.
            option: that gave it, for messages.
            per_item: whether it prints a score an item.

        Raises:
            ParameterError: it is not a command line, or has no `{model}`.
        """
        self.text, self.option, self.per_item = command, option, per_item
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
        total = hashlib.sha256(b"per item" if self.per_item else b"")
        for argument in self.arguments:
            path = Path(argument)
            total.update(_tagged(b"argument", argument.encode()))
            if path.is_file():
                total.update(_tagged(b"file", _digest_of_file(path)))
        return total.hexdigest()

    def score(self, folder: Path) -> float:
        """Return the score of a checkpoint; see `measure`."""
        return self.measure(folder).value

    def measure(self, folder: Path) -> Measured:
        """Run the command on a checkpoint and return the number that it prints last, or the mean of all.

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
        if self.per_item:
            ends = [words[-1] for text in done.stdout.splitlines() if (words := text.split())]
            numbers = [number for word in ends if (number := _number(word)) is not None]
            return Measured.of_items(numbers, line)
        last = (done.stdout.split() or [""])[-1]
        score = _number(last)
        if score is None or not math.isfinite(score):
            raise InputError(f"{line} must print its score last, a finite number, not {last!r}")
        return Measured(score)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


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
