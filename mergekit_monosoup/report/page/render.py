"""A page as HTML: one file with all it needs, whose scripts are named by their hashes."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from mergekit_monosoup.errors import OutputError
from mergekit_monosoup.report.page.content import Page
from mergekit_monosoup.report.versions import installed_version

PAGE_NAME = "monosoup_report.html"
# In this order: what one defines, the next ones use.
_SCRIPTS = (
    "vendor/d3.min.js",
    "vendor/plot.umd.min.js",
    *(f"scripts/{name}.js" for name in ("helpers", "table", "map", "spectra", "cosines", "front")),
)
_LICENCES = ("vendor/LICENSE-d3", "vendor/LICENSE-plot")


def page_html(page: Page) -> str:
    """Return a page as HTML; the same page gives the same text.

    All that comes from reports is escaped, and scripts run by the hash of their text alone (Content
    Security Policy), so that names in other people's files stay names.
    """
    scripts = [_text(name).strip("\n") for name in _SCRIPTS]
    table = page.table
    data = {**page.data, "values": table.values, "groups": table.groups}
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            data={key: value for key, value in data.items() if value is not None},
            # Files of this package, not of a report.
            scripts=[Markup(script) for script in scripts],
            style=Markup(_text("page.css")),
            hashes=[_hash(script) for script in scripts],
            licences=[_text(name) for name in _LICENCES],
            version=installed_version("mergekit-monosoup"),
        )
    )


def write_page(page: Page, file: Path) -> None:
    """Write a page into a file.

    Raises:
        OutputError: the file cannot be written; names it.
    """
    html = page_html(page)
    try:
        file.write_text(html, "utf-8", newline="\n")
    except OSError as error:
        raise OutputError(
            f"page {file} cannot be written ({error.strerror}); name a file in a folder that you can write to"
        ) from error


def _marked(text: str) -> Markup:
    """Return a text, escaped, with what stands between backquotes as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        loader=FunctionLoader(_text),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = _marked
    # Numbers without spaces between them.
    environment.policies["json.dumps_kwargs"] = {
        "sort_keys": False,
        "separators": (",", ":"),
        "ensure_ascii": False,
    }
    return environment
