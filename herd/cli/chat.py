"""`herd chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from herd.cli.completion import models
from herd.cli.options import adapter_option, model_options, opened_from, sampling, sampling_options
from herd.errors import PromptError

if TYPE_CHECKING:
    from herd.cli.opened import Opened

__all__ = ["command", "talk"]

EPILOG = """\
Examples:

\b
  herd chat                                   the small model that comes with herd
  herd chat ./Llama-3.1-8B-Instruct -c 16384  a folder of your own, with room for long talks
  herd chat --system "You are a pirate."
  printf 'Hello.\\nWho are you?\\n' | herd chat    one message per line, replies on stdout

\b
In the chat, /? lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.
"""


@click.command(epilog=EPILOG)
@click.argument("model", default="nano", shell_complete=models)
@click.option("--system", default="", metavar="TEXT", help="System prompt.")
@sampling_options
@model_options
@adapter_option
@click.option("--verbose", is_flag=True, help="Rates and context after each reply, also when not at a terminal.")
def command(model: str, system: str, verbose: bool, **options: Any) -> int:
    """Talk with a model, turn by turn. MODEL is a name (herd models), a folder or a file; nano is the default."""
    chosen = sampling(options)  # checked before a model is loaded
    return talk(opened_from(model, options), chosen, system, verbose=verbose)


def talk(opened: Opened, chosen: dict[str, Any], system: str, *, verbose: bool) -> int:
    """Hold a conversation until the input ends. Where no person types, the status is 1 when a turn or command failed."""
    from herd.cli.commands import Commands
    from herd.cli.console import is_interactive, is_terminal
    from herd.cli.conversation import Conversation
    from herd.cli.lines import PROMPT, PlainLines, TerminalLines
    from herd.cli.repl import Repl

    opened.require_format()
    if opened.is_guard and system:
        raise PromptError(f"{opened.name} judges messages and takes no system prompt: leave --system out")
    conversation = Conversation(
        opened.chat,
        opened.params(chosen),
        system or opened.system,
        apart=opened.is_guard,
        beginning=opened.beginning,
    )
    commands = Commands(conversation, opened.about())
    person, interactive = is_terminal(sys.stdin), is_interactive()
    commands.show_rates = person or verbose
    lines = TerminalLines(commands.names) if interactive else PlainLines(sys.stdin, PROMPT if person else "")
    repl = Repl(conversation, commands, lines, live=interactive)
    if person:
        repl.greet()
    failures = repl.loop()
    return 1 if failures and not person else 0
