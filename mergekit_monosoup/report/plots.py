"""Figures, drawn from records alone; needs matplotlib (the extra `plot`).

Lines are told apart by marker and dash pattern as well as by a colour map of even lightness steps, so
that a figure can be read in grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.report.figures import place
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.report.table import natural_key

_MARKERS = "osD^v<>Pphx*"
_DASHES = ("-", "--", "-.", ":")
_CURVES = 9
_DPI = 150


def write_plots(records: Sequence[TensorRecord], folder: Path) -> list[Path]:
    """Draw every figure for which the records have the numbers.

    Args:
        records: of a report.
        folder: where the PNG files go; created where it is missing.

    Returns:
        The files written; none where nothing was edited.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    plots: dict[str, Callable[[Sequence[TensorRecord]], Any]] = {
        "singular_values": plot_spectra,
        "coefficients": plot_coefficients,
        "energy_by_rank": plot_energy,
        "relative_update": plot_relative_update,
        "cosines": plot_cosines,
    }
    written = []
    for name, plot in plots.items():
        figure = plot(records)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=_DPI)
            written.append(path)
    return written


def plot_spectra(records: Sequence[TensorRecord]) -> Any:
    """Draw s_i / s_1 against i, with the split k marked; None without spectra."""
    chosen = _representative([r for r in records if r.spectrum is not None and r.k is not None])
    if not chosen:
        return None
    figure, axes = _figure("Singular values of the update", width=7.5)
    for number, record in enumerate(chosen):
        curve = record.spectrum
        if curve is None or record.k is None:
            continue
        style = _style(number, len(chosen), marker=False)
        axes.plot(curve.index, curve.value, label=_label(record), **style)
        height = _at(curve.index, curve.value, record.k)
        axes.plot([record.k], [height], marker="o", markersize=7, color=style["color"], mec="black")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("index i")
    axes.set_ylabel("s_i / s_1 (relative to the largest)")
    axes.plot([], [], "o", color="white", mec="black", label="split k")
    _legend(axes)
    return figure


def plot_coefficients(records: Sequence[TensorRecord]) -> Any:
    """Draw lambda_high and lambda_low by depth and module type; None without edited layers."""
    series = _by_module(records, lambda r: r.lambda_high)
    if not series:
        return None
    figure, (high, low) = _figure("Mixing coefficients by depth and module", panels=2, width=9.5)
    for axes, name, other in (
        (high, "λ_high", series),
        (low, "λ_low", _by_module(records, lambda r: r.lambda_low)),
    ):
        _draw_series(axes, other)
        values = [value for points in other.values() for _, value in points]
        axes.set_ylim(max(-0.02, min(values) - 0.05), min(1.02, max(values) + 0.05))
        axes.set_ylabel(f"{name} (factor)")
        axes.set_xlabel("layer (index)")
    _legend(low)
    return figure


def plot_energy(records: Sequence[TensorRecord]) -> Any:
    """Draw the share of the energy kept against the share of the rank; None without spectra."""
    chosen = _representative([r for r in records if r.spectrum is not None and r.r])
    if not chosen:
        return None
    figure, axes = _figure("Energy kept against rank", width=7.5)
    for number, record in enumerate(chosen):
        curve = record.spectrum
        if curve is None or not record.r:
            continue
        style = _style(number, len(chosen), marker=False)
        ranks = [0.0, *(i / record.r for i in curve.index)]
        axes.plot(ranks, [0.0, *curve.energy], label=_label(record), **style)
        if record.k is not None and record.p_k is not None:
            axes.plot(
                [record.k / record.r], [record.p_k], "o", markersize=7, color=style["color"], mec="black"
            )
    axes.plot([], [], "o", color="white", mec="black", label="split k")
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("rank kept, k / r (share)")
    axes.set_ylabel("energy kept, P_k (share)")
    _legend(axes)
    return figure


def plot_relative_update(records: Sequence[TensorRecord]) -> Any:
    """Draw ||dW|| / ||W0|| by layer and module type; None without layers."""
    series = _by_module(records, lambda r: r.relative_update or None)
    if not series:
        return None
    figure, axes = _figure("Relative size of the update by layer", width=7.5)
    _draw_series(axes, series)
    axes.set_yscale("log")
    axes.set_xlabel("layer (index)")
    axes.set_ylabel("‖ΔW‖ / ‖W0‖ (Frobenius norms)")
    _legend(axes)
    return figure


def plot_cosines(records: Sequence[TensorRecord]) -> Any:
    """Draw a histogram of the cosines between updates; None where there is one update only."""
    pairs: dict[str, list[float]] = {}
    for record in records:
        for pair, cosine in record.cosines.items():
            if cosine is not None:
                pairs.setdefault(pair, []).append(cosine)
    if not pairs:
        return None
    figure, axes = _figure("Cosines between the updates of the checkpoints", width=7.5)
    bins = [-1 + i / 25 for i in range(51)]
    for number, (pair, cosines) in enumerate(pairs.items()):
        style = _style(number, len(pairs), marker=False)
        axes.hist(cosines, bins=bins, histtype="step", label=pair, **style)
    axes.set_xlim(-1, 1)
    axes.set_xlabel("cosine of two updates of one tensor")
    axes.set_ylabel("tensors (count)")
    _legend(axes)
    return figure


def _figure(title: str, *, panels: int = 1, width: float = 6.5) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("figures need matplotlib; pip install 'mergekit-monosoup[plot]'") from error
    # Not pyplot: it would choose a window system, and keep every figure in memory.
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    figure.suptitle(title)
    for each in [axes] if panels == 1 else axes:
        each.grid(True, color="0.9")
        each.set_axisbelow(True)
    return figure, axes


def _style(number: int, count: int, *, marker: bool = True) -> dict[str, Any]:
    from matplotlib import colormaps

    # The bright end of the map is lost on white paper.
    colour = colormaps["viridis"](0.88 * number / max(1, count - 1))
    style: dict[str, Any] = {"color": colour, "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 1.6}
    if marker:
        style |= {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4.5}
    return style


def _legend(axes: Any) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)


def _draw_series(axes: Any, series: dict[str, list[tuple[int, float]]]) -> None:
    for number, (module, points) in enumerate(series.items()):
        layers, values = zip(*points, strict=True)
        axes.plot(layers, values, label=module, **_style(number, len(series)))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _by_module(
    records: Sequence[TensorRecord], value: Callable[[TensorRecord], float | None]
) -> dict[str, list[tuple[int, float]]]:
    """Return (layer, value) of the matrices inside layers, by module type."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        where = place(record.tensor)
        number = value(record)
        if where.layer is not None and number is not None and len(record.shape) > 1:
            series.setdefault(where.module, []).append((where.layer, number))
    return {module: sorted(points) for module, points in sorted(series.items())}


def _representative(records: Sequence[TensorRecord]) -> list[TensorRecord]:
    """Return one tensor of each module type from the middle of the model; of many, the largest."""
    modules: dict[str, list[TensorRecord]] = {}
    for record in sorted(records, key=lambda r: natural_key(r.tensor)):
        modules.setdefault(place(record.tensor).module, []).append(record)
    chosen = [group[len(group) // 2] for _, group in sorted(modules.items())]
    largest = sorted(chosen, key=lambda r: -math.prod(r.shape))[:_CURVES]
    return [record for record in chosen if record in largest]


def _label(record: TensorRecord) -> str:
    where = place(record.tensor)
    return where.module if where.layer is None else f"{where.module}, layer {where.layer}"


def _at(index: Sequence[int], values: Sequence[float], k: float) -> float:
    nearest = min(range(len(index)), key=lambda i: abs(index[i] - k))
    return values[nearest]
