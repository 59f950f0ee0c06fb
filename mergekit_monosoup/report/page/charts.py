"""What the page's charts draw, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from mergekit_monosoup.report.figures import change, place
from mergekit_monosoup.report.page.front import Front
from mergekit_monosoup.report.page.public import without_paths
from mergekit_monosoup.report.page.tensors import as_written
from mergekit_monosoup.report.schema import SpectrumCurve, TensorRecord

# More spectra than this, or more points of one, show no more and weigh megabytes.
_MOST_SPECTRA, _POINTS = 1000, 64
# Figure of the map -> (how it is called, what it says, its value in a record).
_MAPPED: dict[str, tuple[str, str, Callable[[TensorRecord], float | None]]] = {
    "lambda_high": (
        "λ_high",
        "factor of the leading directions; the rest is scaled by λ_low",
        lambda r: r.lambda_high,
    ),
    "relative_update": (
        "relative update",
        "‖ΔW‖ / ‖W0‖: where fine-tuning has changed most",
        lambda r: r.relative_update,
    ),
    "rounding_share": (
        "rounding share",
        "how much of the update's norm is rounding of the stored weights",
        lambda r: r.rounding_share,
    ),
    "taken_away": (
        "taken away",
        "‖ΔW − ΔW_edited‖ / ‖ΔW‖: how much of the update the edit takes away",
        lambda r: change(r) if r.action == "edited" else None,
    ),
    "edit_survival": ("edit left", "how much of the edit storage leaves", lambda r: r.edit_survival),
}


def map_data(records: Sequence[TensorRecord], names: dict[str, str]) -> dict[str, Any] | None:
    """Return the figures by module and layer; where a module has several matrices, as experts, their mean.

    Args:
        records: of the report.
        names: what the module of each tensor is called.
    """
    held: dict[tuple[str, int | None], list[TensorRecord]] = {}
    for record in records:
        if len(record.shape) > 1:
            held.setdefault((names[record.tensor], place(record.tensor).layer), []).append(record)
    metrics = {}
    for metric, (name, title, value) in _MAPPED.items():
        cells = [
            {"module": module, "layer": layer, "value": as_written(fmean(values)), "tensor": group[0].tensor}
            for (module, layer), group in held.items()
            if (values := [v for r in group if (v := value(r)) is not None])
        ]
        if cells:
            share = metric != "lambda_high"
            metrics[metric] = {"name": name, "title": title, "share": share, "cells": cells}
    return metrics or None


def spectra_data(records: Sequence[TensorRecord]) -> dict[str, Any] | None:
    """Return the spectra with their splits by tensor, long ones thinned out; None where there are none."""
    drawn = [(r, r.spectrum) for r in records if r.spectrum is not None and r.spectrum.index]
    return {record.tensor: _spectrum(record, curve) for record, curve in drawn[:_MOST_SPECTRA]} or None


def _spectrum(record: TensorRecord, curve: SpectrumCurve) -> dict[str, Any]:
    last, points = len(curve.index) - 1, min(_POINTS, len(curve.index))
    kept = sorted({round(i * last / max(1, points - 1)) for i in range(points)})
    splits = [{"name": "split", "k": record.k, "p_k": record.p_k, "lambda_high": record.lambda_high}]
    splits += [
        {"name": f"R = {energy}", "k": s.get("k"), "p_k": s.get("p_k"), "lambda_high": s.get("lambda_high")}
        for energy, s in record.sweep.items()
    ]
    return {
        "r": record.r or curve.index[-1],
        "matrices": record.matrices or 1,
        "i": [curve.index[i] for i in kept],
        "s": [as_written(curve.value[i], 4) for i in kept],
        "e": [as_written(curve.energy[i], 4) for i in kept],
        "splits": [
            {key: as_written(value) if isinstance(value, float) else value for key, value in split.items()}
            for split in splits
            if split["k"] is not None
        ],
    }


def cosine_data(records: Sequence[TensorRecord]) -> dict[str, list[float]] | None:
    """Return the cosines of each pair of updates over the tensors; None where there is one update only."""
    pairs: dict[str, list[float]] = {}
    for record in records:
        for pair, cosine in record.cosines.items():
            if cosine is not None:
                pairs.setdefault(without_paths(pair), []).append(as_written(cosine, 4))
    return pairs or None


def front_data(front: Front) -> dict[str, Any]:
    """Return a search as the page draws it."""
    return {
        "scores": [score.model_dump() for score in front.scores],
        "trials": [
            {
                "name": without_paths(trial.name),
                "kind": trial.kind,
                "wise_ft": trial.wise_ft,
                "scores": [trial.scores.get(score.name) for score in front.scores],
                "holdout": trial.holdout,
                "on_front": trial.on_front,
                "chosen": index == front.chosen,
            }
            for index, trial in enumerate(front.trials)
        ],
    }
