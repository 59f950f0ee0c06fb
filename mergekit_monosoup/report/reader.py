"""Read reports back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from mergekit_monosoup.errors import InputError
from mergekit_monosoup.report.schema import SCHEMA_VERSION, ReportHeader, TensorRecord

T = TypeVar("T")

FILE_NAME = "monosoup_report.jsonl"


@dataclass(frozen=True)
class Report:
    """A report as it was read."""

    header: ReportHeader
    records: tuple[TensorRecord, ...]


def read_report(path: Path) -> Report:
    """Read a report, or the report that lies in a merged model's folder.

    Raises:
        InputError: no such file, not a report, or of another schema version; names file and line.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist; mergekit-monosoup merge writes {FILE_NAME} into its output")
    lines = file.read_text("utf-8").splitlines()
    if not lines:
        raise InputError(f"{file} is empty; run the merge again")
    header = _parsed(file, 1, lambda: ReportHeader.model_validate(_known_version(json.loads(lines[0]), file)))
    records = []
    for number, line in enumerate(lines[1:], start=2):
        records.append(_parsed(file, number, partial(TensorRecord.model_validate_json, line)))
    return Report(header, tuple(records))


def _parsed(file: Path, number: int, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except (ValidationError, json.JSONDecodeError) as error:
        raise InputError(f"{file}, line {number}: not a line of a report ({_short(error)})") from error


def _known_version(head: object, file: Path) -> object:
    version = head.get("schema_version") if isinstance(head, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{file} begins with schema version {version!r}, and this release reads {SCHEMA_VERSION!r}; "
            "is it a report of mergekit-monosoup of another release?"
        )
    return head


def _short(error: ValidationError | json.JSONDecodeError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
