"""What the subcommands of `herd data` share: options, and writing the rows that stay. No torch."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from herd.cli.console import note
from herd.data.report import counted
from herd.errors import DataError

if TYPE_CHECKING:
    from herd.data.report import RowReport

__all__ = [
    "KIND_NAMES", "bad_option", "check_out", "kind_option", "rewriting_options", "say_notes", "say_report", "write_report",
    "written",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])
KIND_NAMES = ("text", "messages", "sharegpt", "alpaca", "completion", "preference", "prompt")
"""As `herd.data.adapt.KINDS`, which a test compares: importing that here would cost every --help."""

kind_option = click.option(
    "--kind", type=click.Choice(KIND_NAMES), help="What the rows are, instead of recognising it."
)
bad_option = click.option(
    "--bad",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What a bad row does: end the command, or be left out and named.",
)
_rewriting = (
    kind_option,
    bad_option,
    click.option(
        "--report",
        "report_path",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Write a JSON report that names every row that was left out.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUT if it exists."),
    click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON."),
)

_KIND = re.compile(r"(.*): read as (\w+)")

SHOWN = 5
"""Bad rows and others that are shown one by one."""


def rewriting_options(command: F) -> F:
    """--kind, --bad, --report, --overwrite, --json: of commands that write the rows that stay."""
    for add in reversed(_rewriting):
        command = add(command)
    return command


def say_report(report: RowReport, shown: int = SHOWN) -> None:
    """Notes, small repairs and bad rows of a reading, on stderr."""
    say_notes(report.notes)
    for what, count in report.changed.items():
        note(f"{counted(count, 'row')}: {what}")
    for row in report.bad[:shown]:
        note(str(row), "yellow")
    if report.bad_count > shown:
        note(f"{counted(report.bad_count - shown, 'more bad row')}", "yellow")


def say_notes(notes: Sequence[str], shown: int = SHOWN) -> None:
    """Notes of a reading, on stderr; files of one kind beyond the first few in one line."""
    kinds: dict[str, list[str]] = {}
    for text in notes:
        if found := _KIND.fullmatch(text):
            kinds.setdefault(found[2], []).append(found[1])
        else:
            note(text)
    for kind, files in kinds.items():
        for file in files[: shown if len(files) > shown + 1 else None]:
            note(f"{file}: read as {kind}")
        if len(files) > shown + 1:
            note(f"and {len(files) - shown:,} more files, to {files[-1]}: read as {kind}")


def write_report(path: Path, facts: Mapping[str, Any], removed: Sequence[Mapping[str, Any]], report: RowReport) -> None:
    """Write what --report asked for: counts, rows that were left out, bad rows. Raises DataError."""
    told = {**facts, "removed": removed, "bad_rows": [str(row) for row in report.bad]}
    try:
        path.write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: the report cannot be written: {error.strerror or error}") from error


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a destination that `written` would refuse, before anything is read."""
    if not out.name.lower().removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson")):
        raise DataError(f"{out}: rows are written as JSON lines: a name that ends in .jsonl, .jsonl.gz or .jsonl.zst")
    if out.exists() and not overwrite:
        raise DataError(f"{out}: exists already: choose another name, or replace it with --overwrite")


@contextlib.contextmanager
def written(out: Path, source: str, *, overwrite: bool) -> Iterator[Callable[[Any], None]]:
    """Gives a function that writes one row as a line of JSON to `out`, which appears whole at the end or not at all.

    `.gz` and `.zst` are packed. Raises DataError for another ending.
    """
    from herd.checkpoint.write.atomic import new_file

    check_out(out, overwrite=overwrite)
    name, inputs = out.name.lower(), [source] if Path(source).exists() else []
    with new_file(out, overwrite=overwrite, inputs=inputs) as path, contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "wb"))
        packed = _packed(name, file, stack)

        def write(fields: Any) -> None:
            packed.write(json.dumps(fields, ensure_ascii=False, default=_value).encode() + b"\n")

        yield write


def _packed(name: str, file: IO[bytes], stack: contextlib.ExitStack) -> Any:
    if name.endswith(".gz"):
        import gzip

        return stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0))
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{name}: Zstandard data needs the data extra: pip install 'herd[data]'") from error
        return stack.enter_context(zstandard.ZstdCompressor(write_checksum=True).stream_writer(file, closefd=False))
    return file


def _value(value: Any) -> Any:
    """What a Parquet table holds and JSON does not: dates as text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise DataError(f"a {type(value).__name__} cannot be written as JSON: leave its column out")
