"""The page of what lies in a folder: a merge, and the search that chose it."""

from __future__ import annotations

from pathlib import Path

from mergekit_monosoup.report.page.content import Page, merge_page
from mergekit_monosoup.report.page.front import read_front
from mergekit_monosoup.report.page.render import PAGE_NAME, write_page
from mergekit_monosoup.report.reader import FILE_NAME, read_report
from mergekit_monosoup.report.recorder import new_header


def page_of(path: Path, title: str | None = None) -> Page:
    """Return the page of a report, or of a model's folder with its report and, after `tune`, its search.

    Args:
        path: the file or folder.
        title: name of the model; that of the folder or file where it is absent.

    Raises:
        InputError: there is neither a report nor a search, or one of them cannot be read; names the file.
    """
    front = read_front(path) if path.is_dir() else None
    title = title or path.resolve().name.removesuffix(".jsonl")
    if front is not None and not (path / FILE_NAME).exists():
        # The search chose a model that no method of ours made.
        return merge_page(new_header(created=""), (), title, front)
    report = read_report(path)
    return merge_page(report.header, report.records, title, front)


def write_page_into(folder: Path, title: str) -> None:
    """Write the page of a model's folder into it."""
    write_page(page_of(folder, title), folder / PAGE_NAME)
