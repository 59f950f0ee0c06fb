"""Files of the standard library and of installed distributions, and what is prose and code in them."""

from __future__ import annotations

import ast
import csv
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_STDLIB = Path(sysconfig.get_path("stdlib"))
# Tests and data repeat themselves; what lies in site-packages is not the standard library.
_LEFT_OUT = {
    "test",
    "tests",
    "testing",
    "_vendor",
    "idlelib",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_MARKUP = re.compile(r">>>|\.\. |::|\$|\\|[{}<>|=_*`\[\]]{2,}")


class Document(NamedTuple):
    """A text and the name that decides its split."""

    name: str
    text: str


def source_files(
    distribution: str, suffix: str, limit: int, order: Callable[[str], bytes], *, within: str = ""
) -> Iterator[Document]:
    """Yield files of a distribution, or of the standard library ("stdlib"), up to `limit` bytes in all.

    within: only files whose name, as installed, begins so.
    """
    named = _stdlib() if distribution == "stdlib" else installed_files(distribution)
    chosen = [
        name
        for name in named
        if name.endswith(suffix) and name.startswith(within) and _LEFT_OUT.isdisjoint(name.split("/"))
    ]
    size = 0
    for name in sorted(chosen, key=order):
        if size >= limit:
            return
        path = _STDLIB / name if distribution == "stdlib" else located(distribution, name)
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        yield Document(f"{distribution}/{name}", text)


def _stdlib() -> Iterator[str]:
    # Three levels hold the library without walking through site-packages.
    for pattern in ("*.py", "*/*.py", "*/*/*.py"):
        for path in _STDLIB.glob(pattern):
            yield path.relative_to(_STDLIB).as_posix()


@cache
def installed_files(distribution: str) -> tuple[str, ...]:
    """Return the names of a distribution's files, from its RECORD; empty if it has none."""
    # Distribution.files makes objects of every line, which for torch alone takes a second.
    lines = (metadata.distribution(distribution).read_text("RECORD") or "").splitlines()
    return tuple(row[0] for row in csv.reader(lines) if row)


def located(distribution: str, name: str) -> Path:
    """Return where a file of a distribution lies."""
    return Path(str(metadata.distribution(distribution).locate_file(name)))


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a module, its classes and its functions, without their indentation."""
    return [ast.get_docstring(node) or "" for node in _documented(source)]


def strip_docstrings(source: str) -> str:
    """Return the source without the lines of its docstrings."""
    lines = source.splitlines()
    for node in _documented(source):
        text = node.body[0]
        for i in range(text.lineno - 1, text.end_lineno or text.lineno):
            lines[i] = ""
    return "\n".join(lines)


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(source: str) -> list[_Documented]:
    try:
        pending: list[ast.AST] = [ast.parse(source)]
    except SyntaxError:  # templates and the like
        return []
    found = []
    while pending:
        node = pending.pop(0)
        if isinstance(node, _Documented):
            pending += node.body
            if ast.get_docstring(node, clean=False) is not None:
                found.append(node)
    return found


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences, not as a signature, a list of names or a session."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        len(paragraph) >= 80
        and paragraph[0].isupper()
        and paragraph[-1] in ".:!?"
        and letters >= 0.92 * len(paragraph)
        and _MARKUP.search(paragraph) is None
    )
