"""Refuse a recipe that cannot be read before mergekit is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_monosoup.cli.failure import reported_errors


def refuse_unreadable(arguments: Sequence[str]) -> None:
    """Read the recipe among the arguments of `merge`, which are parsed only once mergekit knows its options.

    The first file is the recipe: of the options, none takes a file.

    Raises:
        ClickException: it is not YAML, or of a size that cannot be meant.
    """
    if "--help" in arguments:
        return
    file = next((Path(a) for a in arguments if not a.startswith("-") and _is_file(a)), None)
    if file is None:
        return
    with reported_errors():
        from mergekit_monosoup.planning.plain_yaml import load_yaml, read_text

        load_yaml(read_text(file))


def _is_file(argument: str) -> bool:
    try:
        return Path(argument).is_file()
    except (OSError, ValueError):
        return False
