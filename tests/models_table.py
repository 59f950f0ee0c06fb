"""Write the tables of docs/models.md from what the tests check and what the code goes by.

Run `python tests/models_table.py` after changing tests/families.py or the kinds of files in
checkpoint/companions.py; test_models_table.py fails where the page differs from them.
"""

from __future__ import annotations

from pathlib import Path

from families import FAMILIES, Family

from mergekit_monosoup.checkpoint.companions import CONFIGURATION, LEFT_BEHIND, OTHER, TAKEN, Kind

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
STOCK = {"complete": "yes", "refuses": "refuses", "loses": "loses {} tensors, named in a warning"}


def row(family: Family) -> str:
    """One family as a line of the table."""
    cls = type(family.build()).__name__
    stock = STOCK[family.stock].format(family.reason)
    return f"| {family.name} | `{cls}` | {stock} | yes | {family.note} |"


def families() -> str:
    """The table of model families."""
    head = "| family | class | `mergekit-yaml` | `mergekit-monosoup merge` | note |\n|---|---|---|---|---|\n"
    return head + "\n".join(row(family) for family in FAMILIES)


def kind_row(kind: Kind, *, taken: bool) -> str:
    """One kind of file as a line of the table."""
    names = [f"`{pattern}`" for pattern in kind.patterns if pattern != "*"]
    where = kind.why if taken else f"left behind: {kind.why}"
    return f"| {kind.what} | {', '.join(names)} | {where} |"


def files() -> str:
    """The table of the files beside the weights."""
    lines = ["| kind of file | names | where it comes from |", "|---|---|---|"]
    lines += [kind_row(kind, taken=True) for kind in (CONFIGURATION, *TAKEN, OTHER)]
    lines += [kind_row(kind, taken=False) for kind in LEFT_BEHIND]
    return "\n".join(lines)


TABLES = {"families": families, "files": files}


def page(text: str) -> str:
    """The page with its tables replaced."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
