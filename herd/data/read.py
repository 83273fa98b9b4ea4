"""Rows of data files: JSON lines, JSON arrays, Parquet tables and plain text, with every bad row counted and named. No torch.

What a file may do is bounded: a row has at most MAX_ROW bytes, and only one row is held at a time. Bad rows (not UTF-8, not
JSON, no object, repeated keys, NaN, characters that no text has) are the caller's choice, stop or skip; a damaged file (cut,
wrong checksum) always ends the reading, because nobody knows what is missing.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from json.decoder import JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from herd.data.files import DAMAGE, find_files, form_of, open_bytes
from herd.data.report import BadRow, BadRows, RowReport
from herd.errors import DataError
from herd.files import short

__all__ = [
    "MAX_ROW",
    "BadRow",
    "BadRows",
    "DataError",
    "Row",
    "RowReport",
    "open_rows",
    "read_file",
    "read_rows",
    "type_name",
]

MAX_ROW = 8 << 20
"""Bytes of the largest row, 8 MiB: some two million tokens. What is longer is a file that lost its line ends."""

MAX_ARRAY = 1 << 30
"""Bytes of the largest JSON array, which is held as a whole: 1 GiB. Larger sets are written as JSON lines."""

SEPARATOR = b"<|endoftext|>"
"""A line of plain text that is only this ends a document, as in the files of TinyStories."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the file it stands in, its line (from 1; in a Parquet table, and in a JSON array on one line, its number), and
    its fields.
    """

    path: str
    line: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        """`file:line`, as messages name it."""
        return f"{self.path}:{self.line}"


def open_rows(path: Path | str, report: RowReport | None = None, *, bad: BadRows = "stop") -> Iterator[Row]:
    """The rows of every file that `path` means (`find_files`), in an order that depends on names alone.

    Bad rows end the reading with a DataError that begins with `file:line:`, or are left out and entered in `report`
    (`bad="skip"`). Damaged files raise DataError in both cases. `report.good` counts what was given out.
    """
    report = RowReport() if report is None else report
    for file in find_files(path, report.note):
        yield from read_file(file, report, bad=bad)


def read_rows(
    path: Path | str, report: RowReport | None = None, *, bad: BadRows = "stop", require: tuple[str, ...] = ()
) -> Iterator[Mapping[str, Any]]:
    """The fields of `open_rows`; a row that lacks a key of `require` is a bad row."""
    report = RowReport() if report is None else report
    for row in open_rows(path, report, bad=bad):
        if missing := [key for key in require if key not in row.fields]:
            report.good -= 1
            _reject(report, bad, row.path, row.line, f"missing {', '.join(missing)}")
            continue
        yield row.fields


def read_file(
    path: Path, report: RowReport, *, bad: BadRows = "stop", at: Callable[[int], None] = lambda position: None
) -> Iterator[Row]:
    """The rows of one file, as `open_rows` gives them. `at` is told now and then how many bytes of the file were read.

    A file without any row counts as one bad row: it is what a download or a script leaves that failed, and nobody asks for it.
    """
    name = str(path)
    form = form_of(path)
    if form == "parquet":
        from herd.data.parquet import parquet_rows

        found: Iterator[tuple[int, Any]] = parquet_rows(path, at)
    else:
        found = _unpacked(path, form == "text", form == "array", report, at)
    line = 0
    for line, value in found:
        try:
            fields = _fields(value)
        except DataError as error:
            _reject(report, bad, name, line, str(error))
            continue
        report.good += 1
        yield Row(name, line, fields)
    if not line:
        _reject(report, bad, name, 1, "the file holds no row")


def _reject(report: RowReport, bad: BadRows, path: str, line: int, reason: str) -> None:
    if bad == "stop":
        raise DataError(f"{path}:{line}: {reason}")
    report.reject(path, line, reason)


def _unpacked(
    path: Path, text: bool, array: bool, report: RowReport, at: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    """Lines, elements or documents with their line numbers: values, or the errors that they are."""
    line = 0
    try:
        with open_bytes(path, at) as file:
            start = file.peek(4)[:4] if hasattr(file, "peek") else b""  # type: ignore[attr-defined]
            if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path}:1: the file is UTF-16: save it as UTF-8")
            if start[:3] == b"\xef\xbb\xbf":
                file.read(3)
                report.note(f"{path}: begins with a byte order mark, which is passed over")
            if text:
                items = _documents(path, file, report)
            elif array and _first(file) == b"[":
                items = _elements(path, file)
            else:
                if array and _first_line(file) == b"{":
                    raise DataError(
                        f"{path}:1: one object over several lines: a data file is an array of rows, or one row a line"
                    )
                items = _lines(file, lambda blank: report.note(f"{path}: {_passed_over(blank)}"))
            for line, item in items:  # `line` is for the errors below
                yield line, item
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None and path.suffix not in (".gz", ".zst"):
            raise DataError(f"{path}:{line + 1}: cannot be read on: {error.strerror or error}") from error
        why = str(error) or type(error).__name__
        raise DataError(f"{path}:{line + 1}: the file is damaged or cut here: {why}") from error


def _first(file: BinaryIO) -> bytes:
    """The first byte that is no white space, left where it is."""
    ahead: bytes = file.peek(1 << 12)  # type: ignore[attr-defined]  # buffered, by open_bytes
    return ahead.lstrip()[:1]


def _first_line(file: BinaryIO) -> bytes:
    """The first line that is not blank, without the white space around it, left where it is."""
    ahead: bytes = file.peek(1 << 12)  # type: ignore[attr-defined]  # buffered, by open_bytes
    return ahead.lstrip().partition(b"\n")[0].strip()


def _lines(file: BinaryIO, passed: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """Lines, split on "\\n" only: texts hold other line separators inside their strings. `passed` is told how many were empty."""
    number = blank = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW and not line.endswith(b"\n"):
            size = len(line)
            while (more := file.readline(1 << 20)) and not more.endswith(b"\n"):
                size += len(more)
            yield number, DataError(f"the row has {size + len(more):,} bytes, more than {MAX_ROW:,}")
        elif line.strip():
            yield number, _parsed(line)
        else:
            blank += 1
    if blank:
        passed(blank)


def _passed_over(blank: int) -> str:
    return "1 empty line is passed over" if blank == 1 else f"{blank:,} empty lines are passed over"


def _elements(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array with the lines that they begin on, or their numbers when all stand on one line.

    A syntax error ends it: what follows has no borders.
    """
    data = file.read(MAX_ARRAY + 1)
    if len(data) > MAX_ARRAY:
        raise DataError(f"{path}:1: a JSON array of more than {MAX_ARRAY >> 20} MiB: write it as JSON lines (.jsonl)")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8") from error
    del data
    at, line, seen = text.index("[") + 1, 1, 0
    counted, number = "\n" not in text.strip(), 0
    at = _space(text, at)
    more = text[at : at + 1] != "]"
    while more:
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, end = _DECODER.raw_decode(text, at)
        except DataError as error:  # the syntax is whole, so that its end can be found
            value, end = error, JSONDecoder().raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: {_said(error)}") from error
        if "\\u" in text[at:end] and not isinstance(value, DataError):
            value = _checked(value)
        if end - at > MAX_ROW:
            value = DataError(f"the row has {end - at:,} characters, more than {MAX_ROW:,}")
        number += 1
        yield number if counted else line, value
        at = _space(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _space(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            raise DataError(f"{path}:{line}: not JSON: expected , or ] after an element")
    if text[at + 1 :].strip():
        raise DataError(f"{path}:{line}: not JSON: something follows the array")


def _space(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


_BLANK = re.compile(r"[ \t\r\n]*")


def _documents(path: Path, file: BinaryIO, report: RowReport) -> Iterator[tuple[int, Any]]:
    """One document for a file, or one for each stretch between lines of SEPARATOR; longer ones are cut at an empty line."""
    held: list[bytes] = []
    size = cuts = number = 0
    first = 1
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW and not line.endswith(b"\n"):
            raise DataError(f"{path}:{number}: the line has more than {MAX_ROW:,} bytes: this is no text with lines")
        word = line.strip()
        full = size + len(line) > MAX_ROW
        if word == SEPARATOR or (full and (not word or size > MAX_ROW // 2)):
            if held:
                yield first, _text(b"".join(held))
                cuts += word != SEPARATOR
            held, size = [], 0
        if word != SEPARATOR and (word or held):
            first = first if held else number
            held.append(line)
            size += len(line)
    if held:
        yield first, _text(b"".join(held))
    if cuts:
        report.note(f"{path}: longer than a document may be ({MAX_ROW >> 20} MiB): cut {cuts} times, between lines")


def _text(data: bytes) -> Any:
    """A document as the fields of a row, or the error that it is."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start} of the document")
    return DataError("holds a NUL character: this is no text") if "\0" in text else {"text": text}


def _parsed(line: bytes) -> Any:
    """The value of a line of JSON, or the error that it is."""
    try:
        # Without the line's end, which would be a wrong character in a string that is not closed.
        value = _DECODER.decode(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else " (the last line has no end: the file may be cut)"
        if b"\r" in line.rstrip(b"\r\n"):
            hint = " (lines end in a carriage return alone: save the file with line feeds)"
        return DataError(_said(error) + hint)
    return _checked(value) if b"\\u" in line else value


def _checked(value: Any) -> Any:
    """`value`, or the error that a string in it is no text."""
    try:
        written = json.dumps(value, ensure_ascii=False)
        written.encode("utf-8")
    except UnicodeEncodeError:
        return DataError("a string holds half a surrogate pair")
    if "\\u0000" in written and _holds_nul(value):
        return DataError("a string holds a NUL character")
    return value


def _holds_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_holds_nul(key) or _holds_nul(item) for key, item in value.items())
    return isinstance(value, list) and any(_holds_nul(item) for item in value)


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    if "int_max_str_digits" in str(error):  # Python's own limit, told with advice for programmers
        return f"a number of more than {sys.get_int_max_str_digits():,} digits"
    return str(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"the key {short(twice)} is given twice")
    return found


def _no_number(word: str) -> NoReturn:
    raise DataError(f"not JSON: {word} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _no_number(digits[:20])


_DECODER = JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)

_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _fields(value: Any) -> Mapping[str, Any]:
    """`value` as the fields of a row. Raises DataError with the reason when it is none."""
    if isinstance(value, Exception):
        raise value
    if not isinstance(value, Mapping):
        raise DataError(f"an object was expected, found {type_name(value)}")
    return value


def type_name(value: Any) -> str:
    """What a value is, in words of JSON, with an article."""
    return _NAMES.get(type(value), f"a {type(value).__name__}")
