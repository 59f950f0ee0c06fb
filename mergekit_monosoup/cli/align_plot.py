"""The picture of `mergekit-monosoup align`: the pairs as a heat map, their cosines as a histogram."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_monosoup.errors import ConfigurationError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ConfigurationError("--plot needs matplotlib: pip install 'mergekit-monosoup[plot]'") from error

if TYPE_CHECKING:
    from mergekit_monosoup.alignment.summary import AlignmentSummary

# More pairs than this cannot be told apart in one histogram.
_MOST_PAIRS = 6


def draw(summary: AlignmentSummary, names: list[str], file: Path) -> None:
    """Draw heat map and histogram side by side into `file`, in the format of its suffix.

    Raises:
        ValueError: matplotlib does not know the suffix.
    """
    size = 3.4 + 0.5 * summary.count
    figure = Figure(figsize=(size + 6.0, max(4.2, size * 0.85)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(size, 5.0))
    _heat_map(left, figure, summary, names)
    _histogram(right, summary, names)
    figure.savefig(file, dpi=150)


def _heat_map(axes: Any, figure: Figure, summary: AlignmentSummary, names: list[str]) -> None:
    averages = summary.averages()
    image = axes.imshow(averages, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(summary.count), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(summary.count), names)
    for i, row in enumerate(averages):
        for j, value in enumerate(row):
            # White on the dark ends of the colour map.
            color = "white" if abs(value) > 0.6 else "black"
            label = "none" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"
            axes.text(j, i, label, ha="center", va="center", color=color)
    axes.set_title("Average cosine of the updates")
    figure.colorbar(image, ax=axes, shrink=0.85)


def _histogram(axes: Any, summary: AlignmentSummary, names: list[str]) -> None:
    everything = [value for values in summary.pairs.values() for value in values]
    if not everything:
        axes.text(0.5, 0.5, "no pair of updates", ha="center", va="center", transform=axes.transAxes)
        return
    low, high = min(everything), max(everything)
    margin = max(0.02, 0.05 * (high - low))
    bounds = (max(-1.0, low - margin), min(1.0, high + margin))
    if len(summary.pairs) <= _MOST_PAIRS:
        for (i, j), values in summary.pairs.items():
            label = f"{names[i]}, {names[j]}"
            axes.hist(values, bins=40, range=bounds, histtype="stepfilled", alpha=0.45, label=label)
        # Below the axes: inside, it would hide one pair or another.
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
        axes.legend(**place, ncols=min(2, len(summary.pairs)), fontsize="small", frameon=False)
    else:
        axes.hist(everything, bins=40, range=bounds, color="0.45")
    if low < 0 < high:
        axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("cosine of two updates, one tensor each")
    axes.set_ylabel("tensors")
    axes.yaxis.get_major_locator().set_params(integer=True)
    pairs = len(summary.pairs)
    axes.set_title("Spread over the tensors" + (f", all {pairs} pairs" if pairs > _MOST_PAIRS else ""))
