"""`herd data`: looking at training data and getting it ready. The subcommands are imported when they are chosen."""

from __future__ import annotations

import difflib
from importlib import import_module

import click

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


class _Lazy(click.Group):
    """A group over COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else import_module(entry[0]).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command {name!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=_Lazy, epilog=EXAMPLES)
def command() -> None:
    """Look at training data, and get it ready.

    Data are JSON lines (also .gz and .zst), JSON arrays, Parquet tables and plain text; a path may be a file, a folder or a
    pattern. Chats as messages, ShareGPT or Alpaca, prompt and completion, preferences and texts are recognised by their fields.
    """
