"""`herd data dedup`: rows without those that say what an earlier row said. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from herd.cli.console import note
from herd.cli.data_files import check_out, rewriting_options, say_report, write_report, written
from herd.cli.progress import progress

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd data dedup chats.jsonl clean.jsonl
  herd data dedup texts/ clean.jsonl.zst --threshold 0.7 --report removed.json
  herd data dedup 'shards/*.parquet' clean.jsonl.gz --exact
"""


@click.command(epilog=EPILOG)
@click.argument("source", metavar="IN")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option(
    "--threshold",
    type=click.FloatRange(0.5, 1.0),
    metavar="X",
    help="Share of five-word runs that near duplicates have in common (default: 0.8).",
)
@click.option("--exact", is_flag=True, help="Leave near duplicates in.")
@rewriting_options
def command(
    source: str,
    out: Path,
    threshold: float | None,
    exact: bool,
    kind: Any,
    bad: Any,
    report_path: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Leave out rows that say what an earlier row said, exactly or nearly.

    IN is a file, a folder or a pattern; OUT is JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) with every field of the rows that stay,
    in their order. Of several duplicates the first stays. Near duplicates are found by MinHash, in some 630
    bytes of memory for each row.
    """
    if exact and threshold is not None:
        raise click.UsageError("--threshold is about near duplicates, which --exact leaves in: give one of them")
    from herd.data.adapt import rows_with_records
    from herd.data.duplicates import THRESHOLD, Duplicates
    from herd.data.records import text_of
    from herd.data.report import RowReport

    check_out(out, overwrite=overwrite)
    report = RowReport()
    seen = Duplicates(THRESHOLD if threshold is None else threshold, near=not exact)
    with progress("Reading", "bytes") as tick:
        for row, record in rows_with_records(source, kind, bad=bad, report=report, tick=tick):
            seen.add(text_of(record), row.path, row.line)
    with progress("Comparing", "bands") as tick:
        found = seen.find(tick)
    with progress("Writing", "bytes") as tick, written(out, source, overwrite=overwrite) as write:
        rows = rows_with_records(source, kind, bad=bad, report=RowReport(), tick=tick)
        for number, (row, _) in enumerate(rows):
            if number not in found:
                write(row.fields)
    say_report(report)
    if seen.passed_over:
        note(
            f"{seen.passed_over:,} comparisons of rows that are alike in part were left out: there may be more",
            "yellow",
        )
    exactly = sum(duplicate.exact for duplicate in found.values())
    facts = {"rows": len(seen), "kept": len(seen) - len(found), "exact": exactly, "near": len(found) - exactly}
    facts["bad"] = report.bad_count
    if report_path is not None:
        places = [
            {"row": d.where, "of": d.of, "exact": d.exact, "similarity": round(d.similarity, 3)} for d in found.values()
        ]
        write_report(report_path, facts, places, report)
    if as_json:
        print(json.dumps(facts))
    else:
        left = f"{exactly:,} exact and {facts['near']:,} near duplicates left out"
        left += f", {report.bad_count:,} bad rows" if report.bad_count else ""
        print(f"{facts['kept']:,} of {facts['rows']:,} rows kept: {left}")
