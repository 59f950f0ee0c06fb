"""The commands of mergekit and of this package, run in this process: starting one costs seconds."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

# Nothing but the weights: the checkpoints of the study have no tokenizer, or share one.
_MERGING = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")


# What scores a candidate of a greedy soup; track and checkpoint follow.
SCORE = [sys.executable, "-m", "benchmarks.robustness.score"]


class CommandError(Exception):
    """A command failed; the message holds the command and what it printed."""


def mergekit_yaml(recipe: dict[str, Any], out: Path, *options: str | Path) -> None:
    """`mergekit-yaml RECIPE OUT`: mergekit's own command, with our methods registered."""
    from mergekit_monosoup.registry import register

    register()
    command = importlib.import_module("mergekit.scripts.run_yaml").main
    _run(
        command,
        "mergekit-yaml",
        [_recipe_file(recipe, out), out, *_MERGING, *options],
    )


def merge(recipe: dict[str, Any], out: Path, *options: str | Path) -> None:
    """`mergekit-monosoup merge RECIPE OUT`."""
    monosoup("merge", _recipe_file(recipe, out), out, *_MERGING, *options)


def align(
    base: Path, checkpoints: Sequence[Path], scores: Sequence[float], threshold: float
) -> dict[str, Any]:
    """`mergekit-monosoup align --json`: cosines of the updates, and what sfgs would take."""
    given = [option for score in scores for option in ("--score", repr(score))]
    printed = monosoup("align", base, *checkpoints, *given, "--threshold", str(threshold), "--json")
    found: dict[str, Any] = json.loads(printed[printed.index("{") :])
    return found


def greedy(
    checkpoints: Sequence[Path], out: Path, track: str, short: bool, journal: Path, lower_is_better: bool
) -> list[Path]:
    """`mergekit-monosoup greedy`; returns the members of the soup, in the order they joined."""
    score = [*SCORE, track, *(["--short"] if short else []), "{model}"]
    options = ["--lower-is-better"] if lower_is_better else []
    monosoup(
        "greedy",
        *checkpoints,
        "--out",
        out,
        "--eval",
        shlex.join(score),
        "--journal",
        journal,
        *options,
        *_MERGING,
    )
    recipe = yaml.safe_load((out / "mergekit_config.yml").read_text("utf-8"))
    return [Path(model["model"]) for model in recipe["models"]]


def monosoup(*arguments: str | Path) -> str:
    """Run `mergekit-monosoup` and return what it printed.

    Raises:
        CommandError: it failed.
    """
    from mergekit_monosoup.cli import main

    return _run(main, "mergekit-monosoup", arguments)


def _run(command: Any, name: str, arguments: Sequence[str | Path]) -> str:
    words = [str(argument) for argument in arguments]
    _forget_loaders()
    result = CliRunner().invoke(command, words)
    _forget_loaders()
    print(f"$ {name} {shlex.join(words)}\n{result.output}")
    if result.exception is not None:
        raise CommandError(f"{name} {shlex.join(words)}\n{result.output}") from result.exception
    return result.stdout


def _recipe_file(recipe: dict[str, Any], out: Path) -> Path:
    file = out.with_name(f"{out.name}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    return file


def _forget_loaders() -> None:
    """mergekit keeps its loaders, and with them open files, for the life of a process."""
    from mergekit.io.tasks import LoaderCache

    LoaderCache().loaders.clear()
