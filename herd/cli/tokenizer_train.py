"""`herd tokenizer train`: a vocabulary of one's own. No torch but for the GGUF file."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import click

from herd.cli.bars import stages
from herd.cli.console import note
from herd.cli.data_files import KIND_NAMES, bad_option, say_report
from herd.cli.progress import progress
from herd.cli.sizes import size

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd tokenizer train texts/ --kind tiktoken --vocab-size 32000 --out my-vocabulary
  herd tokenizer train wiki.jsonl.zst books.parquet --kind sentencepiece --vocab-size 32000 --out my-vocabulary
  herd tokenizer train texts/ --kind tiktoken --family llama4 --vocab-size 200000 --sample 500 --out my-vocabulary
  herd tokenizer compare texts/ --tokenizer my-vocabulary
"""


@click.command(epilog=EPILOG)
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option(
    "--kind",
    "scheme",
    type=click.Choice(["sentencepiece", "tiktoken"]),
    required=True,
    help="As Llama 1 and 2 (sentencepiece), or as Llama 3 and 4 (tiktoken).",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(1, 1 << 20),
    required=True,
    help="Ids in all, special tokens included: rows of the embedding.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="A new folder.")
@click.option(
    "--family",
    type=click.Choice(["llama3", "llama4"]),
    help="Whose regex and special tokens (tiktoken only; default llama3).",
)
@click.option("--special", type=click.IntRange(1), help="How many special tokens (tiktoken only).")
@click.option(
    "--sample",
    "megabytes",
    type=click.FloatRange(0, min_open=True),
    default=200.0,
    show_default=True,
    metavar="MB",
    help="Most text to learn from; of more, parts are drawn evenly.",
)
@click.option("--rows", type=click.Choice(KIND_NAMES), metavar="KIND", help="What rows are, instead of recognising it.")
@bad_option
@click.option("--overwrite", is_flag=True, help="Replace FOLDER if it exists and holds a vocabulary.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(
    texts: tuple[str, ...],
    scheme: Any,
    vocab_size: int,
    out: Path,
    family: Any,
    special: int | None,
    megabytes: float,
    rows: Any,
    bad: Any,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Learn a vocabulary from texts, and write it in every file format.

    Each TEXT is a file, a folder or a pattern of JSON lines (also .gz and .zst), Parquet tables or plain text; of conversations
    and other rows all that is said is learned from. FOLDER gets tokenizer.json and the files around it (and tokenizer.model of
    the sentencepiece kind), gguf/tokenizer.gguf, and meta/tokenizer.model of the tiktoken kind. Every file is opened again and
    compared before FOLDER appears. The same texts give the same bytes.
    """
    from herd.checkpoint.write.atomic import check_destination, new_folder
    from herd.train.corpus import sample
    from herd.train.tokenizer import learn, write_vocabulary

    if scheme == "sentencepiece" and (family or special):
        raise click.UsageError("--family and --special are about the tiktoken kind")
    check_destination(out, folder=True, overwrite=overwrite)
    with progress("Reading", "bytes") as tick:
        taken = sample(texts, int(megabytes * 1e6), kind=rows, bad=bad, tick=tick)
    say_report(taken.report)
    if not taken.whole:
        share = f"{size(taken.kept)} of {size(taken.size)}"
        note(f"learned from a sample: {share}, drawn evenly (--sample says how much)")
    with stages("") as watch:
        made = learn(taken.texts, scheme, vocab_size, family=family or "llama3", special=special, watch=watch)
    with new_folder(out, overwrite=overwrite) as folder:
        written = write_vocabulary(made, folder, taken.texts)
    for line in written.notes:
        note(line)
    facts = {
        "out": str(out),
        "kind": scheme,
        "family": made.family,
        "vocab_size": made.vocab_size,
        "special": len(made.special.ids),
        "documents": taken.documents,
        "bytes": taken.size,
        "learned_from": taken.kept,
        "bad": taken.report.bad_count,
        "compared": written.compared,
        "files": list(written.files),
        "sha256": written.sha256,
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{out}: {made.vocab_size:,} ids, {len(made.special.ids):,} of them special, {scheme} as {made.family}")
    print(f"  from {size(taken.kept)} of {taken.documents:,} documents")
    print(textwrap.fill(", ".join(written.files), 80, initial_indent="  ", subsequent_indent="  "))
    print(f"  all opened again: equal ids for {written.compared} texts; sha256 {written.sha256[:16]}")
