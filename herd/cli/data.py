"""`herd data`: looking at training data and getting it ready. The subcommands are imported when they are chosen."""

from __future__ import annotations

import click

from herd.cli.lazy import LazyCommands

__all__ = ["COMMANDS", "command"]

COMMANDS = {
    "lint": ("herd.cli.data_lint", "Say what is in a data file, and what is wrong with it."),
    "dedup": ("herd.cli.data_dedup", "Leave out rows that say what an earlier row said."),
    "filter": ("herd.cli.data_filter", "Leave out rows by quality, language or leakage."),
    "build": ("herd.cli.data_build", "Write tokenized shards that training maps into memory."),
}
"""Subcommands: the module whose `command` each is, and its line in the help."""

EXAMPLES = """\
Examples:

\b
  herd data lint chats.jsonl                          what is in it, bad rows by line, duplicates
  herd data lint chats.jsonl --model nano --length 512 tokens, what is learned, rows that are too long
  herd data lint chats.jsonl --against test.jsonl     what stands in an evaluation file, too
  herd data dedup texts/ clean.jsonl.zst              without exact and near duplicates
  herd data COMMAND --help                            all options of a command
"""


@click.group(cls=LazyCommands, table=COMMANDS, epilog=EXAMPLES)
def command() -> None:
    """Look at training data, and get it ready.

    Data are JSON lines (also .gz and .zst), JSON arrays, Parquet tables and plain text; a path may be a file, a folder or a
    pattern. Chats as messages, ShareGPT or Alpaca, prompt and completion, preferences and texts are recognised by their fields.
    """
