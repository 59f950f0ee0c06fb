"""The page's table: one row a tensor, as it is written and as it is sorted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_monosoup.report.page.advice import GROUPS
from mergekit_monosoup.report.page.public import without_paths
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.report.table import COLUMNS

#: rows that a browser still sorts at once
MOST_ROWS = 3000
_HEADINGS = {
    "p_k": "P_k",
    "rho": "ρ",
    "cos_alpha": "cos α",
    "lambda_low": "λ_low",
    "lambda_high": "λ_high",
    "relative_update": "‖ΔW‖ / ‖W0‖",
    "noise": "σ",
    "threshold": "τ",
    "rounding_share": "rounding",
    "edit_survival": "edit left",
}
_SHOWN = (
    "action", "shape", "r", "k", "p_k", "rho", "cos_alpha", "lambda_low", "lambda_high", "relative_update",
    "rounding_share", "edit_survival", "reason",
)  # fmt: skip
# What methods without a split leave in `figures`.
_MOST_FIGURES = 6


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it says, and whether it holds numbers."""

    heading: str
    title: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows by tensor.

    Args:
        columns: the first is the tensor's name.
        rows: cells as they are read.
        values: cells as they are sorted, null where there is none.
        groups: of each row, the groups it belongs to.
        total: tensors there are; more than rows where the table would be too long.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    values: Sequence[Sequence[float | str | None]]
    groups: Sequence[Sequence[str]]
    total: int


def tensor_table(records: Sequence[TensorRecord], total: int) -> Table:
    """Return the table of some records; columns in which none has a value are left out.

    Args:
        records: in the order of the rows.
        total: of the report.
    """
    shown = [name for name in _SHOWN if any(getattr(r, name) not in (None, "") for r in records)]
    figures = list(dict.fromkeys(name for r in records for name in r.figures))[:_MOST_FIGURES]
    columns = [Column("tensor", "name in the output", number=False)]
    for name in shown:
        title = TensorRecord.model_fields[name].description or ""
        number = name not in ("action", "shape", "reason")
        columns.append(Column(_HEADINGS.get(name, COLUMNS[name][0]), title, number))
    columns += [Column(name) for name in figures]
    rows: list[list[str]] = []
    values: list[list[float | str | None]] = []
    for record in records:
        cells, sorted_by = [record.tensor], [record.tensor]
        rows.append(cells)
        values.append(list[float | str | None](sorted_by))
        for name in shown:
            value = without_paths(record.reason) if name == "reason" else getattr(record, name)
            cells.append(_cell(name, value))
            values[-1].append(_sortable(name, value))
        for name in figures:
            figure = record.figures.get(name)
            cells.append("" if figure is None else f"{figure:.4g}")
            values[-1].append(None if figure is None else as_written(figure))
    groups = [[name for name, (_, belongs) in GROUPS.items() if belongs(r)] for r in records]
    return Table(columns, rows, values, groups, total)


def as_written(value: float, digits: int = 6) -> float:
    """Return a number with few digits, minus zero as zero: what a page shows need not be longer."""
    return float(f"{value:.{digits}g}") + 0.0


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if name == "relative_update":
        return f"{value:#.3g}"
    return COLUMNS[name][1](value)


def _sortable(name: str, value: object) -> float | str | None:
    if name == "shape" and isinstance(value, tuple):
        size = 1.0
        for side in value:
            size *= side
        return size
    if isinstance(value, int | float):
        return as_written(value)
    return None if value is None else str(value)
