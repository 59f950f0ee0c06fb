"""What the figures of the study share: panels, axes, line styles, legends.

Colours are those of Okabe and Ito, told apart by the colour-blind; markers and dashes differ as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from benchmarks.robustness.summary import Result

_DPI = 120

_LINES = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MARKERS = "o*^vDsP<>X"
_DASHES = ("-", "--", "-.", ":")


def axis(result: Result, side: str = "") -> str:
    """Return an axis label with the measure."""
    unit = "share of images" if result["measure"] == "accuracy" else "axis inverted"
    label = f"{result['measure']} ({unit})"
    return f"{side}\n{label}" if side else label


def orient(result: Result, axes: Axes, which: str) -> None:
    """Let better be up and to the right."""
    inverted = axes.xaxis_inverted() if which == "x" else axes.yaxis_inverted()
    if not result["higher_is_better"] and not inverted:
        (axes.invert_xaxis if which == "x" else axes.invert_yaxis)()


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette: a third of the size, and lines and text need no more colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI)
    Image.open(buffer).convert("RGB").quantize(192).save(path, optimize=True)


def style(number: int) -> dict[str, Any]:
    """Return colour, marker and dashes of a line by its number."""
    return {
        "color": _LINES[number % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "markersize": 5,
        "linewidth": 1.4,
    }


def panels(count: int, title: str, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side."""
    # Not pyplot: it would choose a window system, and keep every figure in memory.
    figure = Figure(figsize=(1 + 3.4 * count, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.08))
    made = list(figure.subplots(1, count, squeeze=False, sharey=share)[0])
    figure.suptitle(title)
    for axes in made:
        grid(axes)
    return figure, made


def grid(axes: Axes) -> None:
    """Draw a pale grid behind everything."""
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)


def legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=math.ceil(len(entries) / math.ceil(len(entries) / 6)),
        fontsize="small",
        frameon=False,
    )
