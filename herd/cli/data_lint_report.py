"""What `herd data lint` prints of what it found. No torch."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from herd.cli.console import coloured, note, safe, styled
from herd.cli.data_files import say_notes
from herd.data.report import counted

if TYPE_CHECKING:
    from herd.data.lint import Lint
    from herd.data.preview import Span
    from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["SHOWN", "show", "show_samples", "verdict"]

SHOWN = 5
"""Places that are named without --all."""

PREVIEW = 1500
"""Characters of a sample that are shown."""

BAR = 40


def show(found: Lint, longest: tuple[int, str] | None, evaluation: Any, shown: int | None) -> None:
    """Print what was found. `longest` is the length that rows were held against and what it is called, `shown` how many places
    each list names (None: all)."""
    report = found.report
    say_notes(report.notes)
    if not found.whole:
        note(f"only the first {counted(report.good + report.bad_count, 'row')} read (--limit)", "yellow")
    kinds = ", ".join(f"{count:,} {name}" for name, count in found.kinds.items())
    _head("Rows", f"{report.good:,} good{f' ({kinds})' if kinds else ''}, {report.bad_count:,} bad")
    for what, count in report.changed.items():
        print(f"  {count:,}: {what}")
    if report.bad_count:
        if report.bad_count > SHOWN:
            for reason, count in report.reasons.most_common(None if shown is None else 8):
                print(f"  {count:>6,}  {styled(safe(reason), 'red', sys.stdout)}")
        _places([str(row) for row in report.bad], report.bad_count, shown)
    if found.lengths:
        _show_lengths(found, longest)
        if longest is not None and (count := found.too_long_count):
            _head("Too long", f"{counted(count, 'row')} longer than {longest[1]}", "yellow")
            _places([f"{where}: {size:,} {found.unit}" for where, size in found.too_long], count, shown)
        _show_languages(found.languages)
    if found.unlearned_count:
        _head("Nothing learned", f"{counted(found.unlearned_count, 'row')} without a token that carries loss", "red")
        _places(found.unlearned, found.unlearned_count, shown)
    if found.spelled_count:
        marks = safe(", ".join(name for name, _ in found.spelled.most_common(4)))
        _head("Marks", f"{marks} in {counted(found.spelled_count, 'row')}: read as letters, never as tokens", "yellow")
        print("  (conversations that a template has written already? give their messages instead)")
        _places(found.spelled_rows, found.spelled_count, shown)
    _show_duplicates(found, shown)
    if evaluation is not None:
        _show_leaks(found, evaluation, shown)


def _head(name: str, text: str, style: str | None = None) -> None:
    print(f"{styled(name, 'bold', sys.stdout)}  {text if style is None else styled(text, style, sys.stdout)}")


def _places(places: Sequence[str], count: int, shown: int | None) -> None:
    for place in places[:shown]:
        print(f"  {safe(place)}")
    left = count - len(places[:shown])
    if left:
        print(f"  and {left:,} more{'; --all names them' if shown is not None else ''}")


def _show_lengths(found: Lint, longest: tuple[int, str] | None) -> None:
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
        beyond = longest is not None and low > longest[0] and found.too_long_count
        bar = styled(bar, "red" if beyond else "cyan", sys.stdout) + " " * (BAR - len(bar))
        mark = f"  <- {longest[1]}" if longest is not None and low <= longest[0] <= high else ""
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
    _places([f"{d.where} says what {d.of} says" for d in exact], len(exact), shown)
    _places([f"{d.where} is near {d.of} ({d.similarity:.0%})" for d in near], len(near), shown)
    if not found.compared_fully:
        print("  so many rows are alike in part that not all pairs were compared: there may be more")


def _show_leaks(found: Lint, evaluation: Any, shown: int | None) -> None:
    text = f"{counted(found.leak_count, 'row')} with text of {len(found.leaked_rows):,} of {len(evaluation):,} evaluation rows"
    _head(
        "Leakage",
        text if found.leak_count else f"none with {len(evaluation):,} evaluation rows",
        "red" if found.leak_count else None,
    )
    places = [f'{where} and {leak.where} ({leak.runs} runs): "{leak.words}"' for where, leak in found.leaks]
    _places(places, found.leak_count, shown)
    if evaluation.unchecked:
        print(f"  {counted(evaluation.unchecked, 'evaluation row')} without a text of 8 words: not checked")
    if evaluation.report.bad_count:
        print(
            f"  {counted(evaluation.report.bad_count, 'evaluation row')} not readable: {safe(str(evaluation.report.bad[0]))}"
        )


def show_samples(found: Lint, tokenizer: Tokenizer | None, format: Any) -> None:
    """Print a few rows with what is learned of them."""
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


def verdict(found: Lint, limited: str) -> None:
    """Print whether one can train on this; `limited` is what the longest row is called."""
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
    elif found.too_long_count:
        print(
            styled(
                f"Nothing is wrong with these rows, but of them {found.too_long_count:,} longer than {limited}: training stops "
                "at rows that do not fit (data.length), or leaves them out (data.long_rows: skip).",
                "yellow",
                sys.stdout,
            )
        )
    else:
        print(styled("Nothing stands against training on this.", "green", sys.stdout))
