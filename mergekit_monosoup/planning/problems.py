"""What stands in the way of a merge."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

# Nothing that is longer is a slip of a known name.
_LONGEST_WORD = 60
# Tensors of a kind that a message names.
_NAMED = 2


@dataclass(frozen=True)
class Problem:
    """One finding: an error stops the merge, a warning does not."""

    message: str
    line: int | None = None
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line is not None else self.message


@dataclass
class Problems:
    """The findings of a plan, each of them once."""

    found: list[Problem] = field(default_factory=list)
    _tensors: dict[Problem, tuple[int, list[str]]] = field(default_factory=dict)

    def error(self, message: str, line: int | None = None) -> None:
        """Add a finding that stops the merge."""
        self._add(Problem(message, line))

    def warning(self, message: str, line: int | None = None) -> None:
        """Add a finding that the user should know of."""
        self._add(Problem(message, line, "warning"))

    def about(
        self,
        tensor: str,
        message: str,
        line: int | None = None,
        severity: Literal["error", "warning"] = "error",
    ) -> None:
        """Add a finding about one tensor of perhaps many: those of one kind become one sentence.

        Args:
            tensor: its name.
            message: goes on after the names and a colon.
            line, severity: of the finding.
        """
        kind = Problem(message, line, severity)
        if kind not in self._tensors:
            self._tensors[kind] = len(self.found), []
            self.found.append(kind)
        place, names = self._tensors[kind]
        names.append(tensor)
        self.found[place] = replace(kind, message=f"{some_tensors(names)}: {message}")

    def add(self, others: Problems) -> None:
        """Take over the findings of a part of the plan."""
        for problem in others.found:
            self._add(problem)

    def _add(self, problem: Problem) -> None:
        if problem not in self.found:
            self.found.append(problem)

    @property
    def errors(self) -> list[Problem]:
        """The findings that stop the merge, by line."""
        return sorted((p for p in self.found if p.severity == "error"), key=_by_line)

    @property
    def warnings(self) -> list[Problem]:
        """The other findings, by line."""
        return sorted((p for p in self.found if p.severity == "warning"), key=_by_line)


def _by_line(problem: Problem) -> int:
    return problem.line if problem.line is not None else 1 << 30


def some_tensors(names: Sequence[str]) -> str:
    """Name a few tensors and count the rest."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    shown = ", ".join(names[:_NAMED])
    rest = len(names) - _NAMED
    return f"tensors {shown} and {rest} more" if rest > 0 else f"tensors {shown}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the list of what is known where nothing is near."""
    names, word = sorted(known), word[:_LONGEST_WORD]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:
        folded = {name.lower().replace("-", "_"): name for name in names}
        key = word.lower().replace("-", "_")
        close = [folded[key]] if key in folded else []
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(names)}" if names else ""


_LONGEST_PATH = 300
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40


def short(value: object) -> str:
    """Return a value as a message shows it: like `repr`, cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    return _SHORT.repr(value)


def short_path(path: str) -> str:
    """Return a path as a message shows it: whole, unless no file system would take it."""
    return path if len(path) <= _LONGEST_PATH else f"{path[:100]} ... {path[-100:]}"
