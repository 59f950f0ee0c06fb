"""Figures that tell the truth: scales, splits, and what shares a line."""

from __future__ import annotations

import pytest
from pages import record, records

from mergekit_monosoup.cli.align import _cell

pytest.importorskip("matplotlib", reason="needs the extra `plot`")

from mergekit_monosoup.report.plots import (
    plot_coefficients,
    plot_energy,
    plot_relative_update,
    plot_spectra,
)


def test_small_differences_look_small():
    nearly = [
        record(f"model.layers.{i}.w.weight", lambda_high=h, lambda_low=1 - h, relative_update=0.01 + i * 1e-6)
        for i, h in enumerate((0.99999, 0.99998, 0.99999))
    ]
    (axes,) = plot_relative_update(nearly).axes
    assert axes.get_ylim()[0] == 0
    high, taken = plot_coefficients(nearly).axes
    for axes in (high, taken):
        bottom, top = axes.get_ylim()
        assert top - bottom == pytest.approx(0.2)
        assert bottom < min(axes.lines[0].get_ydata()) < max(axes.lines[0].get_ydata()) < top
    # What is no complement has a panel of its own.
    dropped = [r.model_copy(update={"lambda_high": 1.0, "lambda_low": 0.0}) for r in nearly]
    assert len(plot_coefficients(dropped).axes) == 2
    halved = [r.model_copy(update={"lambda_high": 0.5, "lambda_low": 0.25}) for r in nearly]
    assert len(plot_coefficients(halved).axes) == 3


def test_each_split_is_drawn():
    held = records()
    for plot, scale in ((plot_spectra, 1), (plot_energy, 64)):
        panels = plot(held).axes
        assert len(panels) == 5
        (panel,) = (axes for axes in panels if axes.get_title() == "mlp.up_proj, layer 2")
        # Its own curve and four others, then the splits: k = r here, and R = 0.8.
        assert len(panel.lines) == 5 + 2
        assert [line.get_xdata()[0] * scale for line in panel.lines[5:]] == [64, 16]


def test_experts_are_one_line():
    held = [
        record(f"{stack}.{i}.experts.{e}.w.weight", relative_update=0.01 * (1 + e))
        for stack in ("encoder.block", "decoder.block")
        for i in range(3)
        for e in range(2)
    ]
    (axes,) = plot_relative_update(held).axes
    assert [line.get_label() for line in axes.lines] == [
        "decoder.block: experts.w",
        "encoder.block: experts.w",
    ]
    assert all(line.get_ydata() == pytest.approx([0.015] * 3) for line in axes.lines)


@pytest.mark.parametrize(("value", "shown"), [(-1e-9, "0.0000"), (-0.25, "-0.2500"), (float("nan"), "none")])
def test_minus_zero_is_zero(value, shown):
    assert _cell(value).strip() == shown
