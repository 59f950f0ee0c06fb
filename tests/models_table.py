"""Write the table of model families in docs/models.md from what the tests check.

Run `python tests/models_table.py` after changing tests/families.py; test_models_table.py fails
where the two differ.
"""

from __future__ import annotations

from pathlib import Path

from families import FAMILIES, Family

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
STOCK = {"complete": "yes", "refuses": "refuses", "loses": "loses {} tensors, named in a warning"}


def row(family: Family) -> str:
    """One family as a line of the table."""
    cls = type(family.build()).__name__
    stock = STOCK[family.stock].format(family.reason)
    return f"| {family.name} | `{cls}` | {stock} | yes | {family.note} |"


def table() -> str:
    """The whole table."""
    head = "| family | class | `mergekit-yaml` | `mergekit-monosoup merge` | note |\n|---|---|---|---|---|\n"
    return head + "\n".join(row(family) for family in FAMILIES)


def page(text: str) -> str:
    """The page with its table replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
