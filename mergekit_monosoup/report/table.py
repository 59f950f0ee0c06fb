"""Reports as text: one row a tensor, or two reports side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.report.schema import ACTIONS, ZERO_UPDATE, TensorRecord

# Column -> (heading, how a value is written).
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "action": ("action", str),
    "shape": ("shape", lambda v: "x".join(map(str, v))),
    "dtype": ("dtype", str),
    "backend": ("backend", str),
    "r": ("r", str),
    "k": ("k", lambda v: f"{v:g}"),
    "effective_rank": ("erank", lambda v: f"{v:.1f}"),
    "p_k": ("P_k", lambda v: f"{v:.3f}"),
    "rho": ("rho", lambda v: f"{v:.4f}"),
    "cos_alpha": ("cos_a", lambda v: f"{v:.4f}"),
    "lambda_low": ("l_low", lambda v: f"{v:.4f}"),
    "lambda_high": ("l_high", lambda v: f"{v:.4f}"),
    "update_norm": ("||dW||", lambda v: f"{v:.3g}"),
    "relative_update": ("rel", lambda v: f"{v:.2e}"),
    "noise": ("noise", lambda v: f"{v:.3g}"),
    "threshold": ("tau", lambda v: f"{v:.3g}"),
    "rounding_share": ("round", lambda v: f"{v:.1%}"),
    "edit_survival": ("left", lambda v: f"{v:.1%}"),
    "seconds": ("s", lambda v: f"{v:.3f}"),
    "reason": ("reason", str),
}
DEFAULT_COLUMNS = (
    "action",
    "shape",
    "r",
    "k",
    "p_k",
    "rho",
    "cos_alpha",
    "lambda_high",
    "relative_update",
    "rounding_share",
    "edit_survival",
    "reason",
)
SORTABLE = ("tensor", *(name for name in COLUMNS if name != "shape"))
COMPARABLE = (
    "k",
    "p_k",
    "rho",
    "cos_alpha",
    "lambda_low",
    "lambda_high",
    "update_norm",
    "relative_update",
    "rounding_share",
    "edit_survival",
)


def natural_key(name: str) -> tuple[object, ...]:
    """Return a key that sorts layer 10 behind layer 9."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def field_of(name: str) -> str:
    """Return the field of a record that a name stands for: its own, or the heading of its column."""
    return next((field for field, (heading, _) in COLUMNS.items() if name == heading), name)


def sorted_records(
    records: Sequence[TensorRecord], by: str, *, descending: bool = False
) -> list[TensorRecord]:
    """Return the records by one of their fields; those without a value come last.

    Raises:
        ParameterError: no such field.
    """
    by = field_of(by)
    if by not in SORTABLE:
        raise ParameterError(f"cannot sort by {by!r}; choose from {', '.join(SORTABLE)}")
    named = sorted(records, key=lambda r: natural_key(r.tensor), reverse=descending and by == "tensor")
    if by == "tensor":
        return named
    known = [r for r in named if getattr(r, by) is not None]
    return sorted(known, key=lambda r: getattr(r, by), reverse=descending) + [
        r for r in named if getattr(r, by) is None
    ]


_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|=|<|>)\s*(.+?)\s*")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def condition(text: str) -> Callable[[TensorRecord], bool]:
    """Read a filter: a part of the tensor's name, or a comparison such as `lambda_high<0.5`.

    Raises:
        ParameterError: the field does not exist, or is compared with something of another kind.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        return lambda record: text in record.tensor
    name, sign, value = match.groups()
    name = field_of(name)
    if name not in SORTABLE:
        raise ParameterError(f"cannot filter by {name!r}; choose from {', '.join(SORTABLE)}")
    number: float | None
    try:
        number = float(value)
    except ValueError:
        number = None

    def holds(record: TensorRecord) -> bool:
        field = getattr(record, name)
        if field is None:
            return False
        if isinstance(field, str):
            return _COMPARE[sign](field, value)
        if number is None:
            raise ParameterError(f"{name} is a number, and {value!r} is none")
        return _COMPARE[sign](field, number)

    return holds


def records_table(records: Sequence[TensorRecord], columns: Sequence[str] = DEFAULT_COLUMNS) -> str:
    """Return one row a record; columns in which no record has a value are left out.

    Raises:
        ParameterError: no such column.
    """
    columns = [field_of(name) for name in columns]
    for name in columns:
        if name not in COLUMNS and name != "tensor":
            known = ", ".join(("tensor", *COLUMNS))
            raise ParameterError(f"no column {name!r}; choose from {known}, or the headings of the table")
    # Every row begins with its tensor.
    shown = [
        name
        for name in columns
        if name != "tensor" and any(getattr(r, name) not in (None, "") for r in records)
    ]
    rows = [
        [r.tensor, *("-" if (v := getattr(r, c)) is None else COLUMNS[c][1](v) for c in shown)]
        for r in records
    ]
    return text_table(["tensor", *(COLUMNS[c][0] for c in shown)], rows)


def counted(records: Sequence[TensorRecord]) -> str:
    """Return how many tensors a report has, by what was done with them."""
    counts = Counter("without update" if r.reason == ZERO_UPDATE else r.action for r in records)
    listed = ", ".join(f"{counts[what]} {what}" for what in (*ACTIONS, "without update") if counts[what])
    return f"{len(records)} tensors: {listed or 'none'}"


def summary(records: Sequence[TensorRecord]) -> str:
    """Return the totals of a report in a line."""
    return f"{counted(records)}; {sum(r.seconds or 0 for r in records):.1f} s"


def remark(records: Sequence[TensorRecord]) -> str | None:
    """Return what a user should know where no edit changes anything, None where one does."""
    spectra = [r for r in records if r.action == "edited"]
    moved = [r for r in spectra if r.reason != ZERO_UPDATE]
    if spectra and not moved:
        return (
            "the fine-tuned model holds the values of its base: every update is zero, and nothing was edited"
        )
    if moved and all(r.lambda_high == 1 and r.cos_alpha == 0 for r in moved):
        return (
            "the split keeps all directions of every update (k = r), so nothing was changed; a lower energy "
            "threshold divides them, such as energy: 0.8"
        )
    return None


def comparison_table(
    first: Sequence[TensorRecord], second: Sequence[TensorRecord], field: str
) -> tuple[str, int]:
    """Return the tensors in which two reports differ by `field` or action, and how many those are.

    Raises:
        ParameterError: no such field.
    """
    field = field_of(field)
    if field not in COMPARABLE:
        raise ParameterError(f"cannot compare by {field!r}; choose from {', '.join(COMPARABLE)}")
    one, two = ({r.tensor: r for r in records} for records in (first, second))
    rows: list[tuple[float, list[str]]] = []
    for name in sorted(one | two, key=natural_key):
        a, b = one.get(name), two.get(name)
        x, y = (None if r is None else getattr(r, field) for r in (a, b))
        actions = [r.action if r else "absent" for r in (a, b)]
        if x == y and actions[0] == actions[1]:
            continue
        change = y - x if x is not None and y is not None else None
        write = COLUMNS[field][1]
        cells = [name, *actions, *("-" if v is None else write(v) for v in (x, y))]
        rows.append((abs(change or 0.0), [*cells, "-" if change is None else f"{change:+.3g}"]))
    rows.sort(key=lambda row: -row[0])
    heading = COLUMNS[field][0]
    heads = ["tensor", "action 1", "action 2", f"{heading} 1", f"{heading} 2", "change"]
    return text_table(heads, [cells for _, cells in rows]), len(rows)


def sweep_table(records: Sequence[TensorRecord], energies: Sequence[str]) -> str:
    """Return k and lambda_high of each tensor under the effective rank and under each threshold R."""
    rows = []
    for record in records:
        if not record.sweep or record.k is None or record.lambda_high is None:
            continue
        cells = [record.tensor, f"{record.k:g}", f"{record.lambda_high:.4f}"]
        for energy in energies:
            found = record.sweep[energy]
            cells += [f"{found['k']:g}", f"{found['lambda_high']:.4f}"]
        rows.append(cells)
    heads = ["tensor", "k", "l_high"]
    for energy in energies:
        heads += [f"k R={energy}", f"l_high R={energy}"]
    return text_table(heads, rows)


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: the first and last flush left, numbers flush right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [
            cell.rjust(width) if _is_number(column, rows) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(column: int, rows: Sequence[Sequence[str]]) -> bool:
    cells = [row[column] for row in rows if row[column] != "-"]
    return bool(cells) and all(re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?%?", cell) for cell in cells)
