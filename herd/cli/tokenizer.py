"""`herd tokenizer`: vocabularies of one's own, and how well vocabularies fit a text."""

from __future__ import annotations

import click

from herd.cli.lazy import LazyCommands

__all__ = ["COMMANDS", "command"]

COMMANDS = {
    "train": ("herd.cli.tokenizer_train", "Learn a vocabulary from texts, and write it in every format."),
    "compare": ("herd.cli.tokenizer_compare", "Say how well vocabularies fit texts, beside Llama's."),
}
"""Subcommands: the module whose `command` each is, and its line in the help."""

EXAMPLES = """\
Examples:

\b
  herd tokenizer train texts/ --kind tiktoken --vocab-size 32000 --out my-vocabulary
  herd tokenizer compare texts/ --tokenizer my-vocabulary
"""


@click.group(cls=LazyCommands, table=COMMANDS, epilog=EXAMPLES)
def command() -> None:
    """Learn vocabularies, and compare them."""
