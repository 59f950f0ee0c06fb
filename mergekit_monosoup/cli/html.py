"""The option `--html` of the commands that make a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergekit_monosoup.report.page.content import Page

html_option = click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a page to look at: one file that loads nothing from elsewhere.",
)


def write_html(page: Page, file: Path, *, quiet: bool = False) -> None:
    """Write a page and say so."""
    from mergekit_monosoup.report.page.render import write_page

    write_page(page, file)
    if not quiet:
        click.echo(f"Wrote {file}")
