"""Read the documentation: its code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import click
import yaml
from commands import ROOT


def read(*path: str) -> str:
    """A page of the documentation, by its path from the root of the repository."""
    return ROOT.joinpath(*path).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of this language, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each line of the shell blocks, continued lines joined."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def links(text: str) -> list[str]:
    """The targets of all links to files of the repository."""
    return re.findall(r"\]\((?!https?:)([^)#]+)\)", text)


def check_command(words: list[str]) -> None:
    """Fail if the command does not exist, or does not take these options and arguments."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from mergekit_monosoup.cli import main

    match words:
        case ["mergekit-yaml", *arguments]:
            _parse(mergekit_yaml, arguments)
        case ["mergekit-monosoup", name, *arguments]:
            command = main.get_command(click.Context(main), name)
            assert command is not None, words
            _parse(command, arguments)
        case ["make", target]:
            assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE), words
        case ["hf", "auth", "login"] | ["hf", "upload", _, _] | ["pip", "install", *_]:
            pass
        case _:
            raise AssertionError(f"no check for {words}")


def _parse(command: click.Command, arguments: list[str]) -> None:
    # The parser alone, which checks no values: the models of an example need not exist.
    values, left, _ = command.make_parser(click.Context(command)).parse_args(list(arguments))
    given = {name for name, value in values.items() if value and isinstance(value, str | list | tuple)}
    missing = [p.name for p in command.params if p.required and p.name not in given]
    assert not left, (command.name, left)
    assert not missing, (command.name, missing)


def check_recipe(text: str) -> Any:
    """Fail if mergekit or the merge method refuses the recipe; its configuration."""
    from mergekit import merge_methods
    from mergekit.config import MergeConfiguration

    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    known = {parameter.name for parameter in merge_methods.get(config.merge_method).spec.parameters}
    assert set(config.parameters or {}) <= known
    return config
