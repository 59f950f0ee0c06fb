"""Progress bars and lines of our commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tqdm

from mergekit_monosoup.report.schema import TensorRecord

LOG = logging.getLogger(__name__)


class Progress:
    """A bar over the parameters of a model: name of the tensor, rate, time left.

    Counted in parameters, not tensors, so that the time left holds for tensors of any size. Silent
    when told to be, and where standard error is no terminal.
    """

    def __init__(self, total: float, description: str, *, quiet: bool, unit: str = " parameters") -> None:
        self._bar = tqdm.tqdm(
            total=total or None,
            desc=description,
            unit=unit,
            unit_scale=True,
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def advance(self, name: str, size: float) -> None:
        """Show that one tensor is done."""
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(size)

    def record(self, record: TensorRecord) -> None:
        """Show that one tensor is merged, and log what became of it."""
        size = 1
        for axis in record.shape:
            size *= axis
        self.advance(record.tensor, size)
        if LOG.isEnabledFor(logging.INFO):
            LOG.info("%s", in_a_line(record))

    def tensor(self, record: TensorRecord) -> None:
        """Show that one tensor is looked at, where tensors are what is counted."""
        self.advance(record.tensor, 1)
        if LOG.isEnabledFor(logging.INFO):
            LOG.info("%s", in_a_line(record))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextmanager
def progress(total: float, description: str, *, quiet: bool, unit: str = " parameters") -> Iterator[Progress]:
    """Open a bar and close it in the end, whatever happens."""
    bar = Progress(total, description, quiet=quiet, unit=unit)
    try:
        yield bar
    finally:
        bar.close()


def in_a_line(record: TensorRecord) -> str:
    """Return the outcome for one tensor in a line of a log."""
    figures: list[tuple[str, Any, str]] = [
        ("k", record.k, "g"),
        ("r", record.r, "d"),
        ("lambda_high", record.lambda_high, ".4f"),
        ("lambda_low", record.lambda_low, ".4f"),
        ("relative update", record.relative_update, ".2e"),
        ("seconds", record.seconds, ".3f"),
    ]
    told = ", ".join(f"{name} {value:{style}}" for name, value, style in figures if value is not None)
    reason = f" ({record.reason})" if record.reason else ""
    return f"{record.tensor}: {record.action}{reason}{': ' if told else ''}{told}"
