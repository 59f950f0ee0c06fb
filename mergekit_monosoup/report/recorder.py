"""Collect the records of a merge, and write them as they come."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.report.inputs import InputHashes
from mergekit_monosoup.report.schema import ReportHeader, TensorRecord
from mergekit_monosoup.report.versions import versions


def new_header(**known: object) -> ReportHeader:
    """Return a header with the time and the versions of this process filled in."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return ReportHeader.model_validate({"created": created, "versions": versions(), **known})


class Recorder:
    """Collect records from any thread; with a path, write them as they come.

    While it is open the file begins with a provisional header, so that an interrupted merge leaves a
    report that can be read; `close` replaces it by the one with the hashes of the inputs.
    """

    def __init__(
        self,
        header: ReportHeader,
        path: Path | None = None,
        *,
        hashes: InputHashes | None = None,
        listener: Callable[[TensorRecord], None] | None = None,
    ) -> None:
        self.header = header
        self.path = path
        self._hashes = hashes
        self._listener = listener
        self._lock = threading.Lock()
        self._records: dict[str, TensorRecord] = {}
        self._stream: IO[str] | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = path.open("w", encoding="utf-8", buffering=1)
            except OSError as error:
                raise ConfigurationError(
                    f"report {path} cannot be written ({error}); name a file in a folder that you can "
                    "write to"
                ) from error
            self._stream.write(header.model_dump_json() + "\n")

    @property
    def records(self) -> list[TensorRecord]:
        """The records so far, in the order of their arrival."""
        with self._lock:
            return list(self._records.values())

    def add(self, record: TensorRecord) -> None:
        """Take one record."""
        with self._lock:
            self._records[record.tensor] = record
            if self._stream is not None:
                self._stream.write(record.line() + "\n")
            # Under the lock: listeners draw progress bars, and one at a time is enough for them.
            if self._listener is not None:
                self._listener(record)

    def close(self) -> None:
        """Complete the header and rewrite the file; safe to call again."""
        with self._lock:
            hashes, self._hashes = self._hashes, None
            if hashes is not None:
                self.header = self.header.model_copy(update={"inputs": hashes.result()})
            if self._stream is None or self.path is None:
                return
            self._stream.close()
            self._stream = None
            lines = [self.header.model_dump_json(), *(r.line() for r in self._records.values())]
            unfinished = self.path.with_name(self.path.name + ".tmp")
            unfinished.write_text("\n".join(lines) + "\n", "utf-8")
            os.replace(unfinished, self.path)

    def abort(self) -> None:
        """Stop hashing and leave the file as it is; for a merge that has failed."""
        with self._lock:
            if self._hashes is not None:
                self._hashes.cancel()
                self._hashes = None
            if self._stream is not None:
                self._stream.close()
                self._stream = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
