"""`herd data lint`: what is in a data file, and what is wrong with it. No torch."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from herd.cli.completion import models
from herd.cli.console import safe, styled
from herd.cli.data_files import kind_option
from herd.cli.data_lint_report import SHOWN, show, show_samples, verdict
from herd.cli.progress import progress
from herd.errors import CheckpointError

if TYPE_CHECKING:
    from herd.data.lint import Lint
    from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd data lint chats.jsonl
  herd data lint chats.jsonl --model nano                   tokens, what is learned, rows longer than its context
  herd data lint chats.jsonl --model ./base --format llama3 a base model, and the format it shall learn
  herd data lint chats.jsonl more.jsonl                     several, each looked at alone
  herd data lint train/ --against test.jsonl --against gsm8k.jsonl.gz
  herd data lint chats.parquet --json | jq .bad
"""


@click.command(epilog=EPILOG)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--model", shell_complete=models, help="Whose tokenizer and prompt format to read with.")
@click.option("--format", "format_name", metavar="NAME", help="Prompt format, instead of the model's own.")
@click.option(
    "--length",
    type=click.IntRange(1),
    help="Longest row, in tokens (words without --model): name those beyond. Default: the model's context, but for texts.",
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
@click.option("--json", "as_json", is_flag=True, help="One JSON object; of several paths, by path.")
def command(
    paths: tuple[str, ...],
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

    PATH is a file, a folder or a pattern; of several each has a report of its own. Every row is read as training would read
    it: bad rows are named by line, lengths and duplicates are counted, and a few rows are shown with what is learned of them.
    With --model also tokens, the share of them that is learned, rows longer than its context, and rows that its prompt format
    cannot express. Nothing is changed. The exit status is 1 when rows are bad, teach nothing or hold evaluation data.
    """
    if format_name is not None and model is None:
        raise click.UsageError("--format needs a tokenizer: give --model, too")
    from herd.data.encode import FormatError
    from herd.data.leakage import Evaluation
    from herd.data.lint import lint

    tokenizer, format, context = _opened(model, format_name)
    evaluation = Evaluation(against) if against else None
    limited = "" if length is None else f"--length {length:,}"
    if length is None and context is not None:
        limited = f"the context of {model}, {context:,}"
    facts: dict[str, Any] = {}
    failed, several = False, len(paths) > 1
    for path in paths:
        with progress("Reading", "bytes") as tick:
            try:
                found = lint(
                    path,
                    kind=kind,
                    tokenizer=tokenizer,
                    format=None if format is None or format.name == "base" else format,
                    length=length,
                    context=context,
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
        failed = failed or bool(found.failed)
        if as_json:
            facts[path] = _as_json(found, evaluation)
            continue
        if several:
            print(f"{styled(safe(path), 'bold', sys.stdout)}\n")
        longest = context if length is None else length
        show(found, None if longest is None else (longest, limited), evaluation, None if show_all else SHOWN)
        show_samples(found, tokenizer, format)
        verdict(found, limited)
        if several:
            print()
    if as_json:
        print(json.dumps(facts if several else facts[paths[0]], ensure_ascii=False, indent=1))
    return 1 if failed else 0


def _opened(model: str | None, format_name: str | None) -> tuple[Tokenizer | None, Any, int | None]:
    """Tokenizer, prompt format and context of a model. A folder or file of a tokenizer alone has no context."""
    if model is None:
        return None, None, None
    from herd.chat.formats import detect, format_named
    from herd.checkpoint.open import open_store
    from herd.checkpoint.resolve import resolve
    from herd.checkpoint.vocabulary import tokenizer_at

    place = resolve(model)
    tokenizer = tokenizer_at(place)
    try:
        context = open_store(place, headers_only=True).config.max_seq_len
    except CheckpointError:
        context = None
    return tokenizer, detect(tokenizer) if format_name is None else format_named(format_name, tokenizer), context


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
