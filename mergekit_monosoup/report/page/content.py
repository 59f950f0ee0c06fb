"""What the page of a merge says, derived from its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from mergekit_monosoup.report.figures import change, module_names, place
from mergekit_monosoup.report.page.advice import GROUPS, Finding, findings
from mergekit_monosoup.report.page.front import Front
from mergekit_monosoup.report.page.public import public_name, without_paths
from mergekit_monosoup.report.page.tensors import MOST_ROWS, Table, as_written, tensor_table
from mergekit_monosoup.report.schema import ReportHeader, TensorRecord
from mergekit_monosoup.report.survival import survival_sentence
from mergekit_monosoup.report.table import natural_key

# More spectra than this, or more points of one, show no more and weigh megabytes.
_MOST_SPECTRA, _POINTS = 1000, 64
_METHODS = {
    "monosoup": "MonoSoup",
    "dg_hard": "DG-Hard",
    "model_stock_stable": "Model Stock",
    "sfgs": "The similarity-filtered greedy soup",
}
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


@dataclass(frozen=True)
class Page:
    """What stands on a page; sections without content are left out.

    Args:
        title, subtitle: what the page is of.
        sentences: what was done.
        numbers: labels and values of the totals.
        findings: what is worth a look; None where nothing was looked for.
        table: of the tensors.
        groups: of tensors, by which the table can be filtered, with their names.
        facts: labels and values of where it comes from: inputs, versions.
        recipe: as others may read it.
        data: what the charts draw, as JSON.
    """

    title: str
    subtitle: str
    sentences: Sequence[str]
    numbers: Sequence[tuple[str, str]]
    table: Table
    findings: Sequence[Finding] | None = None
    groups: dict[str, str] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    recipe: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def merge_page(
    header: ReportHeader, records: Sequence[TensorRecord], title: str, front: Front | None = None
) -> Page:
    """Return the page of a report.

    Args:
        header, records: the report.
        title: name of the model.
        front: the search that chose the recipe, where there was one.
    """
    ordered = sorted(records, key=lambda r: natural_key(r.tensor))
    names = module_names(ordered)
    shown = _most_telling(ordered)
    ahead = header.method == "inspect"
    sizes = {r.tensor: r.relative_update or 0.0 for r in shown}
    return Page(
        title=title,
        subtitle="Analysis of an update" if ahead else f"Merged by {header.method or 'mergekit-monosoup'}",
        sentences=_sentences(header, ordered, names),
        numbers=_numbers(ordered),
        findings=findings(ordered, ahead=ahead),
        table=tensor_table(shown, len(ordered)),
        groups={name: said for name, (said, of) in GROUPS.items() if any(of(r) for r in shown)},
        facts=_facts(header),
        recipe=without_paths(header.configuration) if header.configuration else None,
        data={
            "map": _map(ordered, names),
            "spectra": (spectra := _spectra(shown)),
            # Where fine-tuning has changed most.
            "first": max(spectra, key=lambda n: sizes[n]) if spectra else None,
            "cosines": _cosines(ordered),
            "front": front_data(front) if front is not None else None,
        },
    )


def _most_telling(records: list[TensorRecord]) -> list[TensorRecord]:
    """Return all records, of very many those with the largest updates."""
    if len(records) <= MOST_ROWS:
        return records
    largest = sorted(records, key=lambda r: -(r.relative_update or 0.0))[:MOST_ROWS]
    return sorted(largest, key=lambda r: natural_key(r.tensor))


def _sentences(
    header: ReportHeader, records: Sequence[TensorRecord], names: dict[str, str]
) -> list[str]:
    by_role = {
        role: [public_name(m.model) for m in header.inputs if m.role == role] for role in ("base", "finetuned")
    }
    tuned = " and ".join(by_role["finetuned"]) or "the fine-tuned model"
    base = " and ".join(by_role["base"]) or "its base"
    edited = [r for r in records if r.action == "edited" and r.lambda_high is not None]
    counts: dict[str, int] = {}
    for record in records:
        said = "without an update" if record.action == "edited" and record.lambda_high is None else record.action
        counts[said] = counts.get(said, 0) + 1
    listed = ", ".join(f"{count} {said}" for said, count in counts.items()) or "none"
    if header.method == "inspect":
        did = f"The update from {base} to {tuned} was analysed as a merge would edit it; nothing was merged"
    else:
        method = _METHODS.get(header.method or "", header.method or "mergekit-monosoup")
        did = f"{method} was applied to the update from {base} to {tuned}"
    said = [f"{did}. Of {len(records)} tensors: {listed}."]
    if edited:
        said.append(_coefficients(edited))
    sizes = [(r.relative_update, r) for r in records if r.relative_update and len(r.shape) > 1]
    if sizes:
        largest, most = max(sizes, key=lambda pair: pair[0])
        where = place(most.tensor).layer
        said.append(
            f"The update measures {median(size for size, _ in sizes):.2%} of the base (median of the matrices), at "
            f"most {largest:.2%}, in {names[most.tensor]}" + (f" of layer {where}." if where is not None else ".")
        )
    left = survival_sentence([r.edit_survival for r in records], ahead=header.method == "inspect")
    if left is not None:
        said.append(left)
    return said


def _coefficients(edited: Sequence[TensorRecord]) -> str:
    high = fmean(r.lambda_high for r in edited if r.lambda_high is not None)
    low = fmean(r.lambda_low for r in edited if r.lambda_low is not None)
    taken = fmean(value for r in edited if (value := change(r)) is not None)
    alphas = sorted({float(r.parameters["alpha"]) for r in edited if "alpha" in r.parameters})
    scaled = f"; all of it is scaled by α = {' to '.join(f'{a:g}' for a in alphas[:: max(1, len(alphas) - 1)])}"
    return (
        f"On average the leading directions of an update are scaled by λ_high = {high:.3f} and the rest by "
        f"λ_low = {low:.3f}, which takes {taken:.1%} of it away{scaled if alphas else ''}."
    )


def _numbers(records: Sequence[TensorRecord]) -> list[tuple[str, str]]:
    def of(value: Callable[[TensorRecord], float | None]) -> list[float]:
        return [v for r in records if (v := value(r)) is not None]

    edited = [r for r in records if r.action == "edited" and r.lambda_high is not None]
    found: list[tuple[str, list[float], Callable[[Sequence[float]], float], str]] = [
        ("mean λ_high", of(lambda r: r.lambda_high), fmean, ".3f"),
        ("mean k / r", of(lambda r: r.k / r.r if r.k is not None and r.r else None), fmean, ".1%"),
        ("median relative update", of(lambda r: r.relative_update if len(r.shape) > 1 else None), median, ".2%"),
        ("median rounding share", of(lambda r: r.rounding_share), median, ".1%"),
        ("mean edit left", of(lambda r: r.edit_survival), fmean, ".1%"),
    ]
    return [
        ("tensors", f"{len(records):,}"),
        ("edited", f"{len(edited):,}"),
        *((label, format(total(values), how)) for label, values, total, how in found if values),
    ]


def _facts(header: ReportHeader) -> list[tuple[str, str]]:
    facts = [
        (
            "base" if model.role == "base" else "fine-tuned",
            public_name(model.model) + (f" at commit {model.revision}" if model.revision else ""),
        )
        for model in header.inputs
    ]
    facts.append(("made", header.created))
    if header.seed is not None:
        facts.append(("seed", str(header.seed)))
    if header.device is not None:
        facts.append(("device", header.device))
    return [*facts, ("versions", ", ".join(f"{name} {version}" for name, version in header.versions.items()))]


def _map(records: Sequence[TensorRecord], names: dict[str, str]) -> dict[str, Any] | None:
    """Return the figures by module and layer; where a module has several matrices, as experts, their mean."""
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


def _spectra(records: Sequence[TensorRecord]) -> dict[str, Any] | None:
    drawn = [r for r in records if r.spectrum is not None and r.spectrum.index][:_MOST_SPECTRA]
    return {record.tensor: _spectrum(record) for record in drawn} or None


def _spectrum(record: TensorRecord) -> dict[str, Any]:
    curve = record.spectrum
    if curve is None:
        raise ValueError(f"{record.tensor} has no spectrum")
    count = len(curve.index)
    kept = sorted({round(i * (count - 1) / (_POINTS - 1)) for i in range(_POINTS)}) if count > _POINTS else range(count)
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


def _cosines(records: Sequence[TensorRecord]) -> dict[str, list[float | None]] | None:
    pairs: dict[str, list[float | None]] = {}
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
                "name": trial.name,
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
