"""`herd chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from herd.cli.completion import models
from herd.cli.endpoint import Endpoint, key_option
from herd.cli.options import (
    adapter_option,
    model_options,
    opened_from,
    sampling,
    sampling_options,
    tensor_parallel_option,
)
from herd.errors import PromptError

if TYPE_CHECKING:
    from herd.cli.conversation import Conversation
    from herd.cli.opened import Opened

__all__ = ["command", "hold", "talk", "talk_to"]

EPILOG = """\
Examples:

\b
  herd chat                                   the small model that comes with herd
  herd chat ./Llama-3.1-8B-Instruct -c 16384  a folder of your own, with room for long talks
  herd chat --system "You are a pirate."
  herd chat --url http://gpu-box:8000 --model llama3.1     a model of any OpenAI-compatible server
  printf 'Hello.\\nWho are you?\\n' | herd chat    one message per line, replies on stdout

\b
In the chat, /? lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.
"""


LOCAL = ("dtype", "weights", "device", "max_len", "format_name", "adapter", "tensor_parallel")
"""Options about a model that is opened here."""


@click.command(epilog=EPILOG)
@click.argument("model", default="nano", shell_complete=models)
@click.option(
    "--url", metavar="URL", help="Talk with a model of an OpenAI-compatible server, as in http://127.0.0.1:8000."
)
@click.option("--model", "-m", "named", metavar="NAME", help="Which model of that server (default: its only one).")
@key_option
@click.option("--system", default="", metavar="TEXT", help="System prompt.")
@sampling_options
@model_options
@adapter_option
@tensor_parallel_option
@click.option("--verbose", is_flag=True, help="Rates and context after each reply, also when not at a terminal.")
@click.pass_context
def command(
    context: click.Context,
    model: str,
    url: str | None,
    named: str | None,
    api_key: str | None,
    system: str,
    verbose: bool,
    **options: Any,
) -> int:
    """Talk with a model, turn by turn. MODEL is a name (herd models), a folder or a file; nano is the default."""
    chosen = sampling(options)  # checked before a model is loaded
    said = context.get_parameter_source("model") is not click.core.ParameterSource.DEFAULT
    if url is None:
        if named is not None and said:
            raise click.UsageError("MODEL is given twice")
        return talk(opened_from(named or model, options), chosen, system, verbose=verbose)
    for name in LOCAL:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"{name} is about a model that is opened here, and --url names a server that has one"
            )
    return talk_to(Endpoint(url, api_key), named or (model if said else None), chosen, system, verbose=verbose)


def talk_to(server: Endpoint, model: str | None, chosen: dict[str, Any], system: str, *, verbose: bool) -> int:
    """Hold a conversation with a model of a server. Settings that nobody chose are the server's own."""
    from herd.chat.params import SamplingParams
    from herd.cli.console import note
    from herd.cli.conversation import Conversation
    from herd.cli.remote import RemoteChat, model_of

    unsaid = SamplingParams()
    chat = RemoteChat(server, model_of(server, model), unsaid)
    note(f"[{chat.name} at {server.url}: settings that you do not change are the server's own]")
    conversation = Conversation(chat, replace(unsaid, **chosen), system)
    return hold(conversation, {"model": chat.name, "server": server.url}, verbose=verbose)


def talk(opened: Opened, chosen: dict[str, Any], system: str, *, verbose: bool) -> int:
    """Hold a conversation until the input ends. Where no person types, the status is 1 when a turn or command failed."""
    from herd.cli.conversation import Conversation

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
    return hold(conversation, opened.about(), verbose=verbose)


def hold(conversation: Conversation, about: Mapping[str, str], *, verbose: bool) -> int:
    """Read and answer lines until the input ends. `about` are the facts of /show."""
    from herd.cli.commands import Commands
    from herd.cli.console import is_interactive, is_terminal
    from herd.cli.lines import PROMPT, PlainLines, TerminalLines
    from herd.cli.repl import Repl

    commands = Commands(conversation, about)
    person, interactive = is_terminal(sys.stdin), is_interactive()
    commands.show_rates = person or verbose
    lines = TerminalLines(commands.names) if interactive else PlainLines(sys.stdin, PROMPT if person else "")
    repl = Repl(conversation, commands, lines, live=interactive)
    if person:
        repl.greet()
    failures = repl.loop()
    return 1 if failures and not person else 0
