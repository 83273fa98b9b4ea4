"""`herd data lint`: what is in a data file, and what is wrong with it. No torch."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from herd.cli.completion import models
from herd.cli.console import coloured, note, safe, styled
from herd.cli.data_files import kind_option, say_notes
from herd.cli.progress import progress

if TYPE_CHECKING:
    from herd.data.lint import Lint
    from herd.data.preview import Span
    from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd data lint chats.jsonl
  herd data lint chats.jsonl --model nano --length 512      tokens, what is learned, rows that are too long
  herd data lint chats.jsonl --model ./base --format llama3 a base model, and the format it shall learn
  herd data lint train/ --against test.jsonl --against gsm8k.jsonl.gz
  herd data lint chats.parquet --json | jq .bad
"""

SHOWN = 5
"""Places that are named without --all."""

PREVIEW = 1500
"""Characters of a sample that are shown."""

BAR = 40


@click.command(epilog=EPILOG)
@click.argument("path")
@click.option("--model", shell_complete=models, help="Whose tokenizer and prompt format to read with.")
@click.option("--format", "format_name", metavar="NAME", help="Prompt format, instead of the model's own.")
@click.option(
    "--length", type=click.IntRange(1), help="Longest row, in tokens (words without --model): name those beyond."
)
@click.option(
    "--against", multiple=True, metavar="EVAL", help="Evaluation file: name rows that share a run of 13 words."
)
@kind_option
@click.option("--no-near", is_flag=True, help="Look for exact duplicates only.")
@click.option("--limit", type=click.IntRange(1), metavar="ROWS", help="Read only this many rows.")
@click.option(
    "--samples", type=click.IntRange(0), default=2, show_default=True, help="Rows that are shown as they are learned."
)
@click.option("--all", "show_all", is_flag=True, help="Name every row, not only the first few.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(
    path: str,
    model: str | None,
    format_name: str | None,
    length: int | None,
    against: tuple[str, ...],
    kind: Any,
    no_near: bool,
    limit: int | None,
    samples: int,
    show_all: bool,
    as_json: bool,
) -> int:
    """Say what is in training data, and what is wrong with it.

    PATH is a file, a folder or a pattern. Every row is read as training would read it: bad rows are named by line, lengths and
    duplicates are counted, and a few rows are shown with what is learned of them. With --model also tokens, the share of them
    that is learned, and rows that its prompt format cannot express. Nothing is changed. The exit status is 1 when rows are bad,
    teach nothing or hold evaluation data.
    """
    if format_name is not None and model is None:
        raise click.UsageError("--format needs a tokenizer: give --model, too")
    from herd.data.encode import FormatError
    from herd.data.leakage import Evaluation
    from herd.data.lint import lint

    tokenizer, format = _opened(model, format_name)
    evaluation = Evaluation(against) if against else None
    with progress("Reading", "bytes") as tick:
        try:
            found = lint(
                path,
                kind=kind,
                tokenizer=tokenizer,
                format=None if format is None or format.name == "base" else format,
                length=length,
                against=evaluation,
                near=not no_near,
                samples=samples,
                limit=limit,
                tick=tick,
            )
        except FormatError as error:
            place = str(error).split(": ")[0]
            raise click.UsageError(
                f"{place}: conversations need a prompt format, and {model} has none: give one, such as --format llama3"
            ) from error
    if as_json:
        print(json.dumps(_as_json(found, evaluation), ensure_ascii=False, indent=1))
    else:
        _show(found, path, length, evaluation, None if show_all else SHOWN)
        _show_samples(found, tokenizer, format)
        _verdict(found)
    return 1 if found.failed else 0


def _opened(model: str | None, format_name: str | None) -> tuple[Tokenizer | None, Any]:
    if model is None:
        return None, None
    from herd.chat.formats import detect, format_named
    from herd.checkpoint.resolve import resolve
    from herd.checkpoint.vocabulary import tokenizer_at

    tokenizer = tokenizer_at(resolve(model))
    return tokenizer, detect(tokenizer) if format_name is None else format_named(format_name, tokenizer)


def _as_json(found: Lint, evaluation: Any) -> dict[str, Any]:
    report = found.report
    lengths = sorted(found.lengths)
    return {
        "failed": found.failed,
        "rows": report.good,
        "whole": found.whole,
        "kinds": dict(found.kinds),
        "notes": report.notes,
        "changed": dict(report.changed),
        "bad": {"count": report.bad_count, "reasons": dict(report.reasons), "rows": [str(row) for row in report.bad]},
        "unit": found.unit,
        "length": {"sum": sum(lengths), "min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]}
        if lengths
        else None,
        "learned": found.learned if found.unit == "tokens" else None,
        "unlearned": {"count": found.unlearned_count, "rows": found.unlearned},
        "too_long": {"count": found.too_long_count, "rows": [{"row": r, "length": n} for r, n in found.too_long]},
        "duplicates": [
            {"row": d.where, "of": d.of, "exact": d.exact, "similarity": round(d.similarity, 3)}
            for d in found.duplicates.values()
        ],
        "languages": dict(found.languages),
        "marks": {"count": found.spelled_count, "names": dict(found.spelled), "rows": found.spelled_rows},
        "leaks": None
        if evaluation is None
        else {
            "count": found.leak_count,
            "evaluation_rows": len(evaluation),
            "leaked": len(found.leaked_rows),
            "unchecked": evaluation.unchecked,
            "rows": [{"row": r, "of": k.where, "words": k.words, "runs": k.runs} for r, k in found.leaks],
        },
    }


def _show(found: Lint, path: str, length: int | None, evaluation: Any, shown: int | None) -> None:
    report = found.report
    say_notes(report.notes)
    if not found.whole:
        note(f"only the first {report.good + report.bad_count:,} rows were read (--limit)", "yellow")
    kinds = ", ".join(f"{count:,} {name}" for name, count in found.kinds.items())
    _head("Rows", f"{report.good:,} good{f' ({kinds})' if kinds else ''}, {report.bad_count:,} bad")
    for what, count in report.changed.items():
        print(f"  {count:,}: {what}")
    if report.bad_count:
        if report.bad_count > SHOWN:
            for reason, count in report.reasons.most_common(None if shown is None else 8):
                print(f"  {count:>6,}  {styled(safe(reason), 'red', sys.stdout)}")
        _places([str(row) for row in report.bad], report.bad_count, shown, "bad rows")
    if found.lengths:
        _show_lengths(found, length)
        if found.too_long_count:
            _places(
                [f"{where}: {size:,} {found.unit}" for where, size in found.too_long],
                found.too_long_count,
                shown,
                f"rows longer than {length:,}",
            )
        _show_languages(found.languages)
    if found.unlearned_count:
        _head("Nothing learned", f"{found.unlearned_count:,} rows have no token that carries loss", "red")
        _places(found.unlearned, found.unlearned_count, shown, "rows")
    if found.spelled_count:
        marks = safe(", ".join(name for name, _ in found.spelled.most_common(4)))
        _head("Marks", f"{found.spelled_count:,} rows spell {marks}: read as letters, never as tokens", "yellow")
        print("  (conversations that a template has written already? give their messages instead)")
        _places(found.spelled_rows, found.spelled_count, shown, "rows")
    _show_duplicates(found, shown)
    if evaluation is not None:
        _show_leaks(found, evaluation, shown)


def _head(name: str, text: str, style: str | None = None) -> None:
    print(f"{styled(name, 'bold', sys.stdout)}  {text if style is None else styled(text, style, sys.stdout)}")


def _places(places: Sequence[str], count: int, shown: int | None, what: str) -> None:
    for place in places[:shown]:
        print(f"  {safe(place)}")
    left = count - len(places[:shown])
    if left:
        print(f"  and {left:,} more {what}{'; --all names them' if shown is not None else ''}")


def _show_lengths(found: Lint, length: int | None) -> None:
    lengths = sorted(found.lengths)
    total = sum(lengths)
    text = f"{total:,} in all; median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}"
    if found.learned:
        text += f"; {found.learned:,} learned ({found.learned / total:.1%})"
    _head(found.unit.capitalize(), text)
    buckets = Counter(max(size - 1, 0).bit_length() for size in lengths)
    most = max(buckets.values())
    first, last = min(buckets), max(buckets)
    wide = len(f"{1 << max(last - 1, 0):,}-{1 << last:,}")
    for bucket in range(first, last + 1):
        count = buckets[bucket]
        # One outlier is no reason for a page of nothing.
        if not any(buckets[near] for near in range(bucket - 1, bucket + 2)):
            if buckets[bucket - 2]:
                print(f"  {'...':>{wide}}")
            continue
        low, high = (1 << bucket - 1) + 1 if bucket else 0, 1 << bucket
        bar = "\u2588" * round(BAR * count / most) or ("\u258f" if count else "")
        beyond = length is not None and low > length
        bar = styled(bar, "red" if beyond else "cyan", sys.stdout) + " " * (BAR - len(bar))
        mark = f"  <- --length {length:,}" if length is not None and low <= length <= high else ""
        print(f"  {f'{low:,}-{high:,}':>{wide}}  {bar} {count:>8,} {count / len(lengths):>6.1%}{mark}")


def _show_languages(languages: Counter[str]) -> None:
    total = languages.total()
    said = [f"{code} {count / total:.1%}" for code, count in languages.most_common(8)]
    _head("Languages", f"{', '.join(said)} (und: not determined)" if "und" in languages else ", ".join(said))


def _show_duplicates(found: Lint, shown: int | None) -> None:
    exact = [d for d in found.duplicates.values() if d.exact]
    near = [d for d in found.duplicates.values() if not d.exact]
    if not found.duplicates:
        _head("Duplicates", "none")
        return
    _head("Duplicates", f"{len(exact):,} exact, {len(near):,} near (herd data dedup leaves them out)", "yellow")
    _places([f"{d.where} says what {d.of} says" for d in exact], len(exact), shown, "exact")
    _places([f"{d.where} is near {d.of} ({d.similarity:.0%})" for d in near], len(near), shown, "near")
    if not found.compared_fully:
        print("  so many rows are alike in part that not all pairs were compared: there may be more")


def _show_leaks(found: Lint, evaluation: Any, shown: int | None) -> None:
    text = (
        f"{found.leak_count:,} rows share text with {len(found.leaked_rows):,} of {len(evaluation):,} evaluation rows"
    )
    _head(
        "Leakage",
        text if found.leak_count else f"none with {len(evaluation):,} evaluation rows",
        "red" if found.leak_count else None,
    )
    places = [f'{where} and {leak.where} ({leak.runs} runs): "{leak.words}"' for where, leak in found.leaks]
    _places(places, found.leak_count, shown, "rows")
    if evaluation.unchecked:
        print(f"  {evaluation.unchecked:,} evaluation rows hold no text of 8 words: not checked")
    if evaluation.report.bad_count:
        print(
            f"  {evaluation.report.bad_count:,} evaluation rows cannot be read: {safe(str(evaluation.report.bad[0]))}"
        )


def _show_samples(found: Lint, tokenizer: Tokenizer | None, format: Any) -> None:
    from herd.data.preview import preview

    for record in found.samples:
        print()
        legend = "learned" if coloured(sys.stdout) else "[[learned]]"
        legend = f"{styled(legend, 'green', sys.stdout)}, {styled('format', 'yellow', sys.stdout)}, rest is read only"
        print(f"{styled(safe(record.where), 'bold', sys.stdout)}  ({legend})")
        _print_spans(preview(record, tokenizer, format))


def _print_spans(spans: Sequence[Span]) -> None:
    room = PREVIEW
    out: list[str] = []
    for i, span in enumerate(spans):
        text = safe(span.text[:room])
        if coloured(sys.stdout):
            style = "yellow" if span.special and not span.learned else "green" if span.learned else None
            shown = "\n".join(styled(line, style, sys.stdout) if style and line else line for line in text.split("\n"))
        else:
            begins = span.learned and not (i and spans[i - 1].learned)
            ends = span.learned and not (i + 1 < len(spans) and spans[i + 1].learned)
            shown = f"{'[[' if begins else ''}{text}{']]' if ends else ''}"
        out.append(shown)
        room -= len(text)
        if room <= 0:
            break
    left = sum(len(span.text) for span in spans) - (PREVIEW - max(room, 0))
    body = "".join(out).rstrip("\n")
    print("\n".join(f"  {line}" for line in body.split("\n")))
    if left > 0:
        print(f"  ... {left:,} characters more")


def _verdict(found: Lint) -> None:
    print()
    untaught = [name for name in ("preference", "prompt") if found.kinds[name]]
    if found.failed:
        print(styled(f"Not ready to train on: {'; '.join(found.failed)}.", "red", sys.stdout))
    elif untaught:
        print(
            styled(
                f"Nothing is wrong with these rows, but no recipe trains on {' or '.join(untaught)} rows yet.",
                "yellow",
                sys.stdout,
            )
        )
    else:
        print(styled("Nothing stands against training on this.", "green", sys.stdout))
