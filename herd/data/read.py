"""Rows of JSON-lines files, plain, gzip or Zstandard, with every bad row counted and named.

Lines are split on "\\n" only: stories and web text hold other Unicode line separators inside their strings, and
`str.splitlines` would cut such a row in two.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from herd.errors import HerdError

__all__ = ["BadRow", "DataError", "RowReport", "open_rows", "read_rows"]

ZSTD_WINDOW = 1 << 27
"""Largest Zstandard window accepted, bytes (128 MiB): more could be a memory bomb."""


class DataError(HerdError, ValueError):
    """A data file or row that cannot be used."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that was left out: the file, its line (from 1) and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(slots=True)
class RowReport:
    """What reading did: rows given out, and every row left out."""

    good: int = 0
    bad: list[BadRow] = field(default_factory=list)

    def reject(self, path: Path | str, line: int, reason: str) -> None:
        """Record one row that was left out."""
        self.bad.append(BadRow(str(path), line, reason))

    def check(self, allowed: int = 0) -> None:
        """Raise DataError naming the first bad rows when more than `allowed` were left out."""
        if len(self.bad) > allowed:
            shown = "\n  ".join(str(row) for row in self.bad[:5])
            raise DataError(f"{len(self.bad)} bad rows (allowed {allowed}, good {self.good}):\n  {shown}")


def open_rows(path: Path | str) -> BinaryIO:
    """Open `path` for reading bytes, decompressing `.gz` and `.zst` by file name."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such data file")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]  # GzipFile is a BinaryIO in all but name
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: Zstandard data needs the train extra: pip install 'herd[train]'") from error
        reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).stream_reader(path.open("rb"), closefd=True)
        return io.BufferedReader(reader, buffer_size=1 << 20)  # type: ignore[arg-type, return-value]
    return path.open("rb")


def read_rows(
    path: Path | str, report: RowReport | None = None, *, require: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file as dictionaries, in file order.

    A line that is not UTF-8, not JSON, not an object, or lacks a key of `require` is entered in `report` and left out;
    without a report it raises DataError at once. Empty lines are allowed and ignored.
    """
    strict = report is None
    report = RowReport() if report is None else report
    with open_rows(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            reason = None
            row: Any = None
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 at byte {error.start} of the line"
            except json.JSONDecodeError as error:
                reason = f"not JSON: {error.msg} at column {error.colno}"
            if reason is None and not isinstance(row, dict):
                reason = f"an object was expected, found {type(row).__name__}"
            if reason is None:
                missing = [key for key in require if key not in row]
                reason = f"missing {', '.join(missing)}" if missing else None
            if reason is not None:
                report.reject(path, number, reason)
                if strict:
                    report.check()
                continue
            report.good += 1
            yield row
