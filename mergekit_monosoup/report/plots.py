"""Figures, drawn from records alone; needs matplotlib (the extra `plot`).

Lines are told apart by marker and dash pattern as well as by a colour map of even lightness steps, so
that a figure can be read in grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.report.figures import change, module_names, place
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.report.table import natural_key

_MARKERS = "osD^v<>Pphx*"
_DASHES = ("-", "--", "-.", ":")
_CURVES = 9
_DPI = 150
# Of a sum of two coefficients that is said to be one.
_SAME = 1e-6
# Largest over smallest value from which an axis is logarithmic.
_WIDE = 20


def write_plots(records: Sequence[TensorRecord], folder: Path, *, spectra: bool = True) -> list[Path]:
    """Draw every figure for which the records have the numbers.

    Args:
        records: of a report.
        folder: where the PNG files go; created where it is missing.
        spectra: also those of the spectra.

    Returns:
        The files written; none where nothing was edited.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    plots: dict[str, Callable[[Sequence[TensorRecord]], Any]] = {
        **({"singular_values": plot_spectra, "energy_by_rank": plot_energy} if spectra else {}),
        "coefficients": plot_coefficients,
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
    """Draw s_i / s_1 against i, a panel a module, with k under each split; None without spectra."""
    chosen = _representative([r for r in records if r.spectrum is not None and r.k is not None])
    if not chosen:
        return None
    figure, panels = _figure("Singular values of the update", panels=len(chosen))
    # `_figure` has said what to do where matplotlib is missing.
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    curves = [(r.spectrum.index, r.spectrum.value) for r in chosen if r.spectrum is not None]
    least = min(v for _, values in curves for v in values if v > 0)
    for number, (axes, record) in enumerate(zip(panels, chosen, strict=True)):
        _draw_panel(axes, curves, number, _splits(record), "lower left")
        axes.set_title(_label(record), fontsize="small")
        axes.set_xscale("log")
        # Few singular values: powers of ten alone, or all digits of one decade, could not be read.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda index, _: f"{index:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yscale("log")
        # Flat spectra look flat.
        axes.set_ylim(min(least * 0.8, 0.1), 1.3)
    figure.supxlabel("index i")
    figure.supylabel("s_i / s_1 (relative to the largest)")
    return figure


def plot_coefficients(records: Sequence[TensorRecord]) -> Any:
    """Draw lambda_high and what the edit takes away by depth and module; None without edited layers.

    Where lambda_low is not 1 - lambda_high, it has a panel, too.
    """
    edited = [r for r in records if r.lambda_high is not None and r.lambda_low is not None]
    high = _by_module(edited, lambda r: r.lambda_high)
    if not high:
        return None
    panels = [("λ_high (factor of the leading directions)", high)]
    if any(abs((r.lambda_high or 0) + (r.lambda_low or 0) - 1) > _SAME for r in edited):
        panels.append(("λ_low (factor of the rest)", _by_module(edited, lambda r: r.lambda_low)))
    panels.append(("taken away, ‖ΔW − ΔW_edited‖ / ‖ΔW‖", _by_module(edited, change)))
    figure, drawn = _figure("The edit by depth and module", panels=len(panels), width=4.75)
    for axes, (name, series) in zip(drawn, panels, strict=True):
        _draw_series(axes, series)
        axes.set_ylim(*_span([value for points in series.values() for _, value in points], 0.2))
        axes.set_ylabel(name)
        axes.set_xlabel("layer (index)")
    _legend(drawn[len(panels) - 1])
    return figure


def plot_energy(records: Sequence[TensorRecord]) -> Any:
    """Draw the energy kept against the rank kept, both as shares, a panel a module; None without spectra."""
    chosen = _representative([r for r in records if r.spectrum is not None and r.r])
    if not chosen:
        return None
    figure, panels = _figure("Energy kept against rank", panels=len(chosen))
    curves = [
        ([0.0, *(i / (r.r or 1) for i in r.spectrum.index)], [0.0, *r.spectrum.energy])
        for r in chosen
        if r.spectrum is not None
    ]
    for number, (axes, record) in enumerate(zip(panels, chosen, strict=True)):
        splits = [(name, k / (record.r or 1)) for name, k in _splits(record)]
        _draw_panel(axes, curves, number, splits, "lower right")
        axes.set_title(_label(record), fontsize="small")
        axes.set_xlim(0, 1.01)
        axes.set_ylim(0, 1.03)
    figure.supxlabel("rank kept, k / r (share)")
    figure.supylabel("energy kept, P_k (share)")
    return figure


def plot_relative_update(records: Sequence[TensorRecord]) -> Any:
    """Draw ||dW|| / ||W0|| by layer and module type; None without layers."""
    series = _by_module(records, lambda r: r.relative_update or None)
    if not series:
        return None
    figure, (axes,) = _figure("Relative size of the update by layer", width=7.5)
    _draw_series(axes, series)
    values = [value for points in series.values() for _, value in points]
    if max(values) > _WIDE * min(values):
        axes.set_yscale("log")
    else:
        # From zero: what differs by a hundredth must not look different.
        axes.set_ylim(0, 1.08 * max(values))
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
    figure, (axes,) = _figure("Cosines between the updates of the checkpoints", width=7.5)
    bins = [-1 + i / 25 for i in range(51)]
    for number, (pair, cosines) in enumerate(pairs.items()):
        style = _style(number, len(pairs), marker=False)
        axes.hist(cosines, bins=bins, histtype="step", label=pair, **style)
    axes.set_xlim(-1, 1)
    axes.set_xlabel("cosine of two updates of one tensor")
    axes.set_ylabel("tensors (count)")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _legend(axes)
    return figure


def _figure(title: str, *, panels: int = 1, width: float = 3.2) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, at most three beside each other, each of a width in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("figures need matplotlib; pip install 'mergekit-monosoup[plot]'") from error
    columns = min(panels, 3)
    rows = -(-panels // columns)
    # Not pyplot: it would choose a window system, and keep every figure in memory.
    size = (max(7.5, width * columns), 4.2 if rows == 1 else 2.4 * rows)
    figure = Figure(figsize=size, layout="constrained")
    drawn = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.suptitle(title)
    for unused in drawn[panels:]:
        unused.remove()
    for axes in drawn[:panels]:
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
    return figure, drawn[:panels]


def _draw_panel(
    axes: Any,
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    own: int,
    splits: Sequence[tuple[str, float]],
    corner: str,
) -> None:
    """Draw one curve, the others behind it in grey, and where it is split."""
    for number, (x, y) in enumerate(curves):
        if number != own:
            axes.plot(x, y, color="0.8", linewidth=1)
    axes.plot(*curves[own], color="black", linewidth=1.8)
    for number, (name, at) in enumerate(splits):
        style = _style(number, len(splits), marker=False)
        axes.axvline(at, label=name, **style)
    axes.legend(fontsize="x-small", loc=corner)


def _splits(record: TensorRecord) -> list[tuple[str, float]]:
    """Return name and k of a record's own split and of those at other thresholds."""
    found = [] if record.k is None else [(f"k = {record.k:g}", record.k)]
    for energy, at in record.sweep.items():
        if (k := at.get("k")) is not None:
            found.append((f"R = {energy}: k = {k:g}", k))
    return found


def _span(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return limits of an axis from 0 to 1: no narrower than `least`, however close the values lie."""
    low, high = min(values), max(values)
    margin = max(0.05 * (high - low), (least - (high - low)) / 2, 0.01)
    low, high = low - margin, high + margin
    if high > 1.02:
        low, high = min(low, 1.02 - least), max(1.02, max(values))
    if low < -0.02:
        low, high = min(-0.02, *values), max(high, least - 0.02)
    return low, high


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
    """Return (layer, value) of the matrices inside layers, by module; of experts, the mean."""
    names = module_names(records)
    held: dict[str, dict[int, list[float]]] = {}
    for record in records:
        layer, number = place(record.tensor).layer, value(record)
        if layer is not None and number is not None and len(record.shape) > 1:
            held.setdefault(names[record.tensor], {}).setdefault(layer, []).append(number)
    return {
        module: [(layer, fmean(values)) for layer, values in sorted(layers.items())]
        for module, layers in sorted(held.items())
    }


def _representative(records: Sequence[TensorRecord]) -> list[TensorRecord]:
    """Return one tensor of each module from the middle of the model; of many, the largest."""
    names = module_names(records)
    modules: dict[str, list[TensorRecord]] = {}
    for record in sorted(records, key=lambda r: natural_key(r.tensor)):
        modules.setdefault(names[record.tensor], []).append(record)
    chosen = [group[len(group) // 2] for _, group in sorted(modules.items())]
    largest = sorted(chosen, key=lambda r: -math.prod(r.shape))[:_CURVES]
    return [record for record in chosen if record in largest]


def _label(record: TensorRecord) -> str:
    where = place(record.tensor)
    return where.module if where.layer is None else f"{where.module}, layer {where.layer}"
