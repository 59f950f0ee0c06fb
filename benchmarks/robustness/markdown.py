"""Numbers and tables as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from benchmarks.robustness.summary import Result, mean_and_spread


class Scale:
    """How the scores of a result file are shown: shares as per cent, bits per byte as they are."""

    def __init__(self, result: Result) -> None:
        accuracy = result["measure"] == "accuracy"
        self.factor, self.digits = (100.0, 1) if accuracy else (1.0, 3)
        self.unit = "accuracy in %, higher is better" if accuracy else _unit(result)
        self.points = "points" if accuracy else result["measure"]

    def plain(self, values: Sequence[float]) -> str:
        """Return mean ± standard deviation; without the latter for a single value."""
        mean, spread = mean_and_spread(values)
        shown = f"{self.factor * mean:.{self.digits}f}"
        return shown if spread is None else f"{shown} ± {self.factor * spread:.{self.digits}f}"

    def signed(self, values: Sequence[float]) -> str:
        """Return the same with a sign."""
        mean, spread = mean_and_spread(values)
        shown = self.change(mean)
        return shown if spread is None else f"{shown} ± {self.factor * spread:.{self.digits}f}"

    def change(self, value: float) -> str:
        """Return a number with its sign."""
        # Adding zero turns -0.0 into 0.0.
        rounded = round(self.factor * value, self.digits) + 0.0
        return f"{rounded:+.{self.digits}f}"


def _unit(result: Result) -> str:
    return f"{result['measure']}, {'higher' if result['higher_is_better'] else 'lower'} is better"


def wrapped(text: str, width: int = 110) -> str:
    """Return a paragraph, or an item of a list, in lines of at most so many characters."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, rule, *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
