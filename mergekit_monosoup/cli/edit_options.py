"""Options of the commands that edit adapters, or make one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Rank(click.ParamType):  # type: ignore[type-arg]
    """An integer, a share of the energy, or `auto`."""

    name = "R|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or `auto`."""
        if not isinstance(value, str) or value == "auto":
            return value
        try:
            return int(value)
        except ValueError:
            pass
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'auto'", param, ctx)


_EDIT_OPTIONS = (
    click.option("--energy", type=float, help="Fixed energy threshold in (0, 1]; left out: effective rank."),
    click.option(
        "--split",
        type=click.Choice(["effective_rank", "energy", "donoho_gavish"]),
        help="Rule for the split; `energy` alone: 0.8. The factors of an adapter have no noise, so that "
        "donoho_gavish keeps all of them.",
    ),
    click.option(
        "--threshold-scale",
        type=float,
        default=1.0,
        show_default=True,
        help="Factor on the Donoho-Gavish threshold.",
    ),
    click.option(
        "--mixing",
        type=click.Choice(["monosoup", "decay", "alignment", "uniform", "high", "low"]),
        default="monosoup",
        show_default=True,
        help="MonoSoup, or one of its ablations.",
    ),
    click.option("--alpha", type=float, default=1.0, show_default=True, help="Wise-FT factor on the update."),
)


def edit_options(command: F) -> F:
    """Give a command the options that say how an update is split and mixed: those of the merge method."""
    for option in reversed(_EDIT_OPTIONS):
        command = option(command)
    return command
