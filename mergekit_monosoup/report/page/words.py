"""What a merge did, in sentences and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from mergekit_monosoup.report.figures import change, place
from mergekit_monosoup.report.page.front import Front
from mergekit_monosoup.report.page.public import public_name, without_paths
from mergekit_monosoup.report.schema import ReportHeader, TensorRecord
from mergekit_monosoup.report.survival import survival_sentence
from mergekit_monosoup.report.table import counted

_METHODS = {
    "monosoup": "MonoSoup",
    "dg_hard": "DG-Hard",
    "model_stock_stable": "Model Stock",
    "sfgs": "The similarity-filtered greedy soup",
}


def sentences(header: ReportHeader, records: Sequence[TensorRecord], names: dict[str, str]) -> list[str]:
    """Return what was done and where the update lies; nothing without records.

    Args:
        header, records: of the report.
        names: what the module of each tensor is called.
    """
    if not records:
        return []
    ahead = header.method == "inspect"
    tuned = _models(header, "finetuned") or "the fine-tuned model"
    base = _models(header, "base") or "its base"
    if ahead:
        did = f"The update from {base} to {tuned} was analysed as a merge would edit it; nothing was merged"
    else:
        method = _METHODS.get(header.method or "", header.method or "mergekit-monosoup")
        did = f"{method} was applied to the update from {base} to {tuned}"
    found: list[str | None] = [
        f"{did}. {counted(records)}.",
        _coefficients(records),
        _scaled(records),
        _largest(records, names),
        survival_sentence([r.edit_survival for r in records], ahead=ahead),
    ]
    return [sentence for sentence in found if sentence is not None]


def search_sentence(front: Front) -> str:
    """Return which trial of a search was chosen."""
    trial = front.trials[front.chosen]
    scored = ", ".join(f"{name} {value:.5g}" for name, value in trial.scores.items() if value is not None)
    name = without_paths(trial.name)
    return f"The recipe was chosen among {len(front.trials)} trials of a search: {name} ({scored})."


def _models(header: ReportHeader, role: str) -> str:
    return " and ".join(public_name(m.model) for m in header.inputs if m.role == role)


def _coefficients(records: Sequence[TensorRecord]) -> str | None:
    edited = [
        (r.lambda_high, r.lambda_low, taken)
        for r in records
        if r.lambda_high is not None and r.lambda_low is not None and (taken := change(r)) is not None
    ]
    if not edited:
        return None
    high, low, taken = (fmean(values) for values in zip(*edited, strict=True))
    return (
        f"On average the leading directions of an update are scaled by λ_high = {high:.3f} and the rest by "
        f"λ_low = {low:.3f}, which takes {taken:.1%} of it away."
    )


def _scaled(records: Sequence[TensorRecord]) -> str | None:
    alphas = [a for r in records if isinstance(a := r.parameters.get("alpha"), int | float)]
    if not alphas:
        return None
    ends = dict.fromkeys(f"{a:g}" for a in (min(alphas), max(alphas)))
    return f"What is left of an update is scaled by α = {' to '.join(ends)}."


def _largest(records: Sequence[TensorRecord], names: dict[str, str]) -> str | None:
    sizes = [(r.relative_update, r.tensor) for r in records if r.relative_update and len(r.shape) > 1]
    if not sizes:
        return None
    largest, tensor = max(sizes)
    layer = place(tensor).layer
    return (
        f"The update measures {median(size for size, _ in sizes):.2%} of the base (median of the matrices), "
        f"at most {largest:.2%}, in {names[tensor]}{'' if layer is None else f' of layer {layer}'}."
    )


def numbers(records: Sequence[TensorRecord]) -> list[tuple[str, str]]:
    """Return labels and values of a report's totals, those that it has."""

    def of(value: Callable[[TensorRecord], float | None]) -> list[float]:
        return [v for r in records if (v := value(r)) is not None]

    edited = [r for r in records if r.action == "edited" and r.lambda_high is not None]
    found: list[tuple[str, list[float], Callable[[Sequence[float]], float], str]] = [
        ("mean λ_high", of(lambda r: r.lambda_high), fmean, ".3f"),
        ("mean k / r", of(lambda r: r.k / r.r if r.k is not None and r.r else None), fmean, ".1%"),
        (
            "median relative update",
            of(lambda r: r.relative_update if len(r.shape) > 1 else None),
            median,
            ".2%",
        ),
        ("median rounding share", of(lambda r: r.rounding_share), median, ".1%"),
        ("mean edit left", of(lambda r: r.edit_survival), fmean, ".1%"),
    ]
    return [
        ("tensors", f"{len(records):,}"),
        *([("edited", f"{len(edited):,}")] if edited else []),
        *((label, format(total(values), how)) for label, values, total, how in found if values),
    ]


def facts(header: ReportHeader) -> list[tuple[str, str]]:
    """Return labels and values of what went in, when, and by which versions."""
    found = [
        (
            "base" if model.role == "base" else "fine-tuned",
            public_name(model.model) + (f" at commit {model.revision}" if model.revision else ""),
        )
        for model in header.inputs
    ]
    found.append(("made", header.created))
    if header.seed is not None:
        found.append(("seed", str(header.seed)))
    if header.device is not None:
        found.append(("device", header.device))
    return [*found, ("versions", ", ".join(f"{name} {version}" for name, version in header.versions.items()))]
