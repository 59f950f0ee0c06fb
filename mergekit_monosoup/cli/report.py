"""`mergekit-monosoup report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_monosoup.cli.failure import reported_errors
from mergekit_monosoup.cli.html import html_option, write_html

if TYPE_CHECKING:
    from mergekit_monosoup.report.schema import TensorRecord


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option("--sort", default="tensor", show_default=True, help="Field to sort by, such as lambda_high.")
@click.option("--descending", is_flag=True, help="Largest first.")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="CONDITION",
    help="Part of a tensor's name, or a comparison such as 'lambda_high<0.5' or action=kept; repeatable.",
)
@click.option("--columns", metavar="NAMES", help="Comma-separated fields or headings to show.")
@click.option("--limit", type=click.IntRange(min=1), help="Show this many rows only.")
@click.option(
    "--by", default="lambda_high", show_default=True, help="Field by which two reports are compared."
)
@click.option("--json", "as_json", is_flag=True, help="Print the selected records as JSON lines.")
@html_option
def report(
    file: Path,
    other: Path | None,
    sort: str,
    descending: bool,
    filters: tuple[str, ...],
    columns: str | None,
    limit: int | None,
    by: str,
    as_json: bool,
    html: Path | None,
) -> None:
    """Print the report FILE as a table, compare it with the report OTHER, or make a page of it.

    Each may be a monosoup_report.jsonl or a folder that holds one.
    """
    from mergekit_monosoup.report.reader import read_report
    from mergekit_monosoup.report.table import (
        DEFAULT_COLUMNS,
        comparison_table,
        condition,
        records_table,
        remark,
        sorted_records,
        summary,
    )

    if html is not None:
        if other is not None:
            raise click.UsageError("--html makes the page of one report; leave out OTHER")
        with reported_errors():
            from mergekit_monosoup.report.page.folder import page_of

            write_html(page_of(file), html)
        return
    with reported_errors():
        conditions = [condition(text) for text in filters]

        def selected(path: Path) -> list[TensorRecord]:
            records = [r for r in read_report(path).records if all(holds(r) for holds in conditions)]
            return sorted_records(records, sort, descending=descending)

        records = selected(file)
        if other is not None:
            table, count = comparison_table(records, selected(other), by)
            click.echo(table)
            click.echo(f"{count} tensors differ")
            return
        shown = records[:limit]
        if as_json:
            for record in shown:
                click.echo(json.dumps(json.loads(record.line())))
            return
        names = tuple(columns.split(",")) if columns else DEFAULT_COLUMNS
        click.echo(records_table(shown, tuple(name.strip() for name in names)))
        click.echo(summary(records))
        if (note := remark(records)) is not None:
            click.echo(note)
