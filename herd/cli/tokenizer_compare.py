"""`herd tokenizer compare`: how well vocabularies fit texts, beside Llama's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.bars import stages
from herd.cli.columns import columns
from herd.cli.console import note
from herd.cli.data_files import KIND_NAMES, bad_option, say_report

if TYPE_CHECKING:
    from herd.tokenizer.tokenizer import Tokenizer
    from herd.train.compression import Fit

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd tokenizer compare texts/ --tokenizer my-vocabulary
  herd tokenizer compare mine.jsonl --tokenizer a --tokenizer b --plot fit.png
  herd tokenizer compare mine.jsonl --no-llama --tokenizer nano --json
"""

LLAMAS = {"llama2": "Llama 1/2, 32K", "llama3": "Llama 3, 128K", "llama4": "Llama 4, 202K"}
CATALOG = {
    "llama2": ("llama-2-7b", "llama-2-7b-chat", "llama-2-13b", "llama-7b"),
    "llama3": ("llama-3.2-1b", "llama-3.2-1b-instruct", "llama-3.1-8b", "llama-3.1-8b-instruct", "llama-3-8b"),
    "llama4": ("llama-4-scout", "llama-4-scout-instruct"),
}
"""Models of the catalog whose files, when they are on this machine, hold the vocabulary."""
SHOWN = 20
"""Files in the table; --json has all."""


@click.command(epilog=EPILOG)
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--tokenizer", "names", multiple=True, metavar="NAME", help="A vocabulary: a folder, file or model.")
@click.option("--no-llama", is_flag=True, help="Leave out Llama's own vocabularies.")
@click.option(
    "--sample",
    "megabytes",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    metavar="MB",
    help="Most text of each file that is counted; of more, parts are drawn evenly.",
)
@click.option("--rows", type=click.Choice(KIND_NAMES), metavar="KIND", help="What rows are, instead of recognising it.")
@bad_option
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="A picture (png, svg, pdf)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(
    texts: tuple[str, ...],
    names: tuple[str, ...],
    no_llama: bool,
    megabytes: float,
    rows: Any,
    bad: Any,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Say how well vocabularies fit texts, beside Llama's own where they are on this machine.

    More bytes in a token are fewer steps for the same text. Broken tokens are unknown or hold only a part of a character. Words
    are what stands between white space, so tokens in a word say little of Chinese or Thai.
    """
    from herd.checkpoint.vocabulary import load_tokenizer
    from herd.data.report import RowReport
    from herd.errors import ConfigError
    from herd.train.compression import draw, measure, together

    tokenizers: dict[str, Tokenizer] = {}
    for name in names:
        if name in tokenizers:
            raise click.UsageError(f"--tokenizer {name} is given twice")
        tokenizers[name] = load_tokenizer(name)
    missing: list[str] = []
    for family, label in {} if no_llama else LLAMAS.items():
        found = _released(family)
        if found is None:
            missing.append(label)
            note(f"{label}: not on this machine, so it is left out ({', '.join(CATALOG[family][:2])} would bring it)")
        else:
            tokenizers[label] = found
    if not tokenizers:
        raise ConfigError("there is no vocabulary to compare: name one with --tokenizer")
    report = RowReport()
    with stages("") as watch:
        fits, whole = measure(texts, tokenizers, int(megabytes * 1e6), kind=rows, bad=bad, report=report, watch=watch)
    say_report(report)
    if not whole:
        note(f"of each file at most {megabytes:g} MB were counted, drawn evenly (--sample says how much)")
    sums = together(fits)
    if plot is not None:
        draw(fits if len({fit.file for fit in fits}) <= SHOWN else sums, plot)
        note(f"written: {plot}")
    sizes = {name: tokenizer.vocab_size for name, tokenizer in tokenizers.items()}
    if as_json:
        told = {"files": [_facts(fit) for fit in fits], "all": [_facts(fit) for fit in sums]}
        print(json.dumps(told | {"vocab_sizes": sizes, "missing": missing, "whole": whole, "bad": report.bad_count}))
        return
    _show(fits, sums, sizes)


def _released(family: str) -> Tokenizer | None:
    """Llama's own vocabulary, from a model of this machine, the llama-models package or HERD_SHARED; None when nowhere."""
    from herd.bench.tokenizer import find_models
    from herd.checkpoint.vocabulary import load_tokenizer
    from herd.errors import HerdError

    for name in CATALOG[family]:
        try:
            return load_tokenizer(name)
        except HerdError:  # not here, or without a tokenizer
            continue
    found = dict(find_models(Path(os.environ.get("HERD_SHARED") or "shared")))
    return load_tokenizer(found[family]) if family in found else None


def _facts(fit: Fit) -> dict[str, Any]:
    return {
        "file": fit.file,
        "tokenizer": fit.tokenizer,
        "bytes": fit.size,
        "words": fit.words,
        "tokens": fit.tokens,
        "broken": fit.broken,
        "bytes_per_token": round(fit.bytes_per_token, 4),
        "tokens_per_word": round(fit.tokens_per_word, 4),
        "broken_share": round(fit.broken_share, 6),
    }


def _show(fits: list[Fit], sums: list[Fit], sizes: dict[str, int]) -> None:
    files = list(dict.fromkeys(fit.file for fit in fits))
    shown = [fit for fit in fits if fit.file in files[:SHOWN]] + (sums if len(files) > 1 else [])
    table = [("text", "vocabulary", "ids", "bytes/token", "tokens/word", "broken")]
    last = ""
    for fit in shown:
        name = "" if fit.file == last else Path(fit.file).name
        last = fit.file
        numbers = f"{fit.bytes_per_token:.3f}", f"{fit.tokens_per_word:.3f}", f"{fit.broken_share:.2%}"
        table.append((name, fit.tokenizer, f"{sizes[fit.tokenizer]:,}", *numbers))
    print(columns(table, right=range(2, 6)))
    if len(files) > SHOWN:
        note(f"{len(files) - SHOWN:,} more files are counted in 'all'; --json names them")
