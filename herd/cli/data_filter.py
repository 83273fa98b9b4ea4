"""`herd data filter`: rows without those that break quality rules, are in other languages or leak evaluations. No torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.console import note
from herd.cli.data_files import rewriting_options, say_report, write_report, written
from herd.cli.progress import progress

if TYPE_CHECKING:
    from herd.data.filters import Rules

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd data filter pages.jsonl.zst good.jsonl.zst --rules gopher,repetition
  herd data filter pages.jsonl good.jsonl --rules gopher --set min_words=20 --set max_symbols=0.2
  herd data filter mixed.jsonl english.jsonl --language en --tag lang
  herd data filter chats.jsonl clean.jsonl --against eval/ --report removed.json

Groups of rules: gopher, repetition, c4 (docs/train/data.md says what each rule is). They are about running text: chats are
filtered by language and leakage. The tag "und" stands for texts whose language cannot be told: --language en,und keeps them.
"""


@click.command(epilog=EPILOG)
@click.argument("source", metavar="IN")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option(
    "--rules", "groups", metavar="GROUPS", help="Quality rules for texts: gopher, repetition, c4 (with commas)."
)
@click.option(
    "--set", "bounds", multiple=True, metavar="NAME=NUMBER", help="A bound of the rules, such as min_words=20."
)
@click.option("--language", "codes", metavar="CODES", help="Keep texts in these languages: en,de,...")
@click.option("--tag", metavar="FIELD", help="Write the language of each row into this field.")
@click.option(
    "--against", multiple=True, metavar="EVAL", help="Leave out rows that share a run of 13 words with this file."
)
@rewriting_options
def command(
    source: str,
    out: Path,
    groups: str | None,
    bounds: tuple[str, ...],
    codes: str | None,
    tag: str | None,
    against: tuple[str, ...],
    kind: Any,
    bad: Any,
    report_path: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Leave out rows by quality rules, by language, or because they hold evaluation data.

    IN is a file, a folder or a pattern; OUT is JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) with every field of the rows that stay,
    in their order. The report counts every rule that left rows out, and --report FILE names the rows.
    """
    if bounds and groups is None:
        raise click.UsageError("--set changes the bounds of --rules: give these, too")
    if groups is None and codes is None and tag is None and not against:
        raise click.UsageError("nothing to filter by: give --rules, --language, --tag or --against")
    from herd.data.adapt import rows_with_records
    from herd.data.filters import judge
    from herd.data.languages import language
    from herd.data.leakage import Evaluation
    from herd.data.records import TextRecord, text_of
    from herd.data.report import RowReport
    from herd.errors import DataError

    rules = None if groups is None else _rules(groups, bounds)
    wanted = None if codes is None else _languages(codes)
    evaluation = Evaluation(against) if against else None
    report = RowReport()
    reasons: Counter[str] = Counter()
    removed: list[dict[str, Any]] = []
    with progress("Filtering", "bytes") as tick, written(out, source, overwrite=overwrite) as write:
        for row, record in rows_with_records(source, kind, bad=bad, report=report, tick=tick):
            if rules is not None and not isinstance(record, TextRecord):
                raise DataError(f"{row.where}: quality rules are for texts, and this is no text: leave --rules out")
            text = text_of(record)
            if tag is not None and tag in row.fields:
                raise DataError(f"{row.where}: there is a field {tag!r} already: give --tag another name")
            reason = None if rules is None else judge(text, rules)
            code = language(text).code if wanted is not None or tag is not None else ""
            if reason is None and wanted is not None and code not in wanted:
                reason = f"language {code}"
            of = ""
            if reason is None and evaluation is not None and (leaks := evaluation.leaks(text)):
                reason, of = "leakage", leaks[0][1].where
            if reason is None:
                write(row.fields if tag is None else {**row.fields, tag: code})
                continue
            reasons[reason] += 1
            if report_path is not None:
                removed.append({"row": row.where, "reason": reason} | ({"of": of} if of else {}))
    say_report(report)
    if evaluation is not None and evaluation.unchecked:
        note(f"{evaluation.unchecked:,} evaluation rows hold no text of 8 words: not checked")
    if evaluation is not None and evaluation.report.bad_count:
        first = evaluation.report.bad[0]
        note(f"{evaluation.report.bad_count:,} evaluation rows cannot be read and were not checked: {first}", "yellow")
    kept = report.good - reasons.total()
    facts = {"rows": report.good, "kept": kept, "left_out": dict(reasons.most_common()), "bad": report.bad_count}
    if report_path is not None:
        write_report(report_path, facts, removed, report)
    if as_json:
        print(json.dumps(facts))
        return
    for reason, count in reasons.most_common():
        print(f"{count:>8,}  {reason}")
    print(f"{kept:,} of {report.good:,} rows kept" + (f", {report.bad_count:,} bad rows" if report.bad_count else ""))


def _rules(groups: str, bounds: tuple[str, ...]) -> Rules:
    from herd.data.filters import Rules

    changes: dict[str, Any] = {}
    for bound in bounds:
        name, _, value = bound.partition("=")
        if name not in Rules.names():
            raise click.UsageError(f"--set {bound}: the bounds are {', '.join(Rules.names())}")
        try:
            changes[name] = int(value) if isinstance(getattr(Rules(), name), int) else float(value)
        except ValueError:
            raise click.UsageError(f"--set {bound}: {value!r} is no number of the right kind") from None
    return Rules(groups=tuple(part.strip() for part in groups.split(",") if part.strip()), **changes)


def _languages(codes: str) -> set[str]:
    from herd.data.languages import LANGUAGES, UNDETERMINED

    wanted = {code.strip() for code in codes.split(",") if code.strip()}
    if unknown := sorted(wanted - {*LANGUAGES, UNDETERMINED}):
        raise click.UsageError(f"--language {unknown[0]}: the tags are {', '.join(LANGUAGES)}, und")
    return wanted
