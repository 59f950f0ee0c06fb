"""What an inspection asks of a tensor, and what a tensor says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_monosoup.checkpoint.lineage import Relation
from mergekit_monosoup.report.measure import edit_fields
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.spectral.analysis import Analysis
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split


@dataclass(frozen=True)
class Question:
    """What is asked of each tensor.

    Args:
        energies: further thresholds R to split by.
        device: where to decompose.
        split, mixing: of the record itself.
    """

    energies: tuple[float, ...] = ()
    device: str = "cpu"
    split: Split = EFFECTIVE_RANK
    mixing: Mixing = "monosoup"


@dataclass(frozen=True)
class Looked:
    """What one tensor says: its record, and how each fine-tuned one lies to the base."""

    record: TensorRecord
    relations: tuple[tuple[str, Relation | None], ...] = ()


def sweep(analysis: Analysis | None) -> dict[str, dict[str, float]]:
    """Return the split at each threshold R as a report has it."""
    names = ("k", "p_k", "rho", "cos_alpha", "lambda_low", "lambda_high")
    if analysis is None or not analysis.singular_values:
        return {}
    return {
        f"{energy:g}": {name: edit_fields(record)[name] for name in names}
        for energy, record in analysis.fixed.items()
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last part of each path, or the whole of them where those are not distinct."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)
