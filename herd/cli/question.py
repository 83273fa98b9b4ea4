"""What one run asks of a model: a prompt, a text to go on with, a middle to fill in, or a conversation from a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

import click

from herd.cli.console import is_terminal, note
from herd.errors import PromptError

if TYPE_CHECKING:
    from herd.chat.format import Delta, ToolSpec
    from herd.chat.infill import InfillOrder
    from herd.chat.messages import Message
    from herd.chat.params import SamplingParams
    from herd.cli.opened import Opened
    from herd.cli.progress import Tick

__all__ = [
    "Question",
    "middle_between",
    "prefix_from",
    "prompt_from",
    "read_conversation",
    "the_conversation",
    "the_prompt",
    "the_text",
]

Question = Callable[["Opened", "SamplingParams", "Tick"], Iterator["Delta"]]
"""Puts itself to an opened model: the deltas of the reply. Raises HerdError."""


def the_prompt(prompt: str, system: str) -> Question:
    """A user's message, in the model's prompt format."""

    def ask(opened: Opened, params: SamplingParams, tick: Tick) -> Iterator[Delta]:
        from herd.chat.messages import Message

        opened.require_format()
        told = system or opened.system
        messages = [*([Message("system", told)] if told else []), *opened.beginning, Message("user", prompt)]
        return opened.chat.stream(messages, params=params, on_prefill=tick)

    return ask


def the_text(text: str) -> Question:
    """Plain text to go on with."""
    return lambda opened, params, tick: opened.chat.complete(text, params, on_prefill=tick)


def middle_between(prefix: str, suffix: str, order: InfillOrder) -> Question:
    """The text between two texts."""
    return lambda opened, params, tick: opened.chat.infill(prefix, suffix, params, order=order, on_prefill=tick)


def the_conversation(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Question:
    """The next message of a conversation; of a Guard, its verdict on the last one."""

    def ask(opened: Opened, params: SamplingParams, tick: Tick) -> Iterator[Delta]:
        from herd.chat.messages import Message

        opened.require_format()
        if messages[-1].role == "assistant" and not opened.is_guard:
            raise PromptError(
                "the conversation ends with an assistant message, so there is nothing to answer: only Guards judge those"
            )
        told = [Message("system", opened.system)] if opened.system and messages[0].role != "system" else []
        return opened.chat.stream([*told, *messages], tools, params, on_prefill=tick)

    return ask


def read_conversation(file: TextIO) -> tuple[tuple[Message, ...], tuple[ToolSpec, ...]]:
    """Messages and tools of a JSON file: a list of messages, or an object with them (as /save writes it). PromptError."""
    from herd.chat.render import messages_from
    from herd.chat.toolspec import tools_from

    try:
        content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{file.name} is not JSON text: {error}") from None
    tools, system = [], None
    if isinstance(content, Mapping):  # "system" is where the files of /save have it
        tools, system, content = content.get("tools") or [], content.get("system"), content.get("messages")
    if not isinstance(content, list) or not content or not isinstance(tools, list):
        raise PromptError(f"{file.name} holds no conversation: it needs a list of messages, or an object with one")
    return messages_from([*([{"role": "system", "content": system}] if system else []), *content]), tools_from(tools)


def prompt_from(given: str | None, *, exact: bool, wait: bool) -> str | None:
    """The prompt: the argument, then what is piped in; None when there is neither and a person sits at the terminal.

    A pipe is read when there is no argument, or with `wait`, or when it says something (or ends) within a moment: programs
    start others with pipes that nobody ever writes to. White space around what is piped in is dropped; where it counts
    (`exact`), only the last line end is. Raises click.UsageError for an empty prompt.
    """
    from herd.cli.lines import GLANCE, read_all, speaks

    text = "" if given is None or given == "-" else given
    if given == "-" or not is_terminal(sys.stdin):
        if text and not wait and not speaks(sys.stdin):
            note(
                f"[nothing came through the pipe within {GLANCE:g} s: answering the prompt alone; --wait waits for the pipe]"
            )
            return text
        piped = read_all(sys.stdin, _waiting)
        piped = piped.removesuffix("\n") if exact else piped.strip()
        text = f"{text}\n\n{piped}" if text and piped else text or piped
    elif given is None:
        return None
    if not text.strip():
        raise click.UsageError("the prompt is empty: give a PROMPT, or pipe one in")
    return text


def prefix_from(given: str | None) -> str:
    """What stands before a middle: the argument, or without one (or with "-") all that is piped in, as it is."""
    from herd.cli.lines import read_all

    if given is not None and given != "-":
        return given
    if given is None and is_terminal(sys.stdin):
        raise click.UsageError("--suffix needs the text before the middle: give a PROMPT, or pipe it in")
    return read_all(sys.stdin, _waiting)


def _waiting() -> None:
    note("reading the prompt from standard input (end it with Ctrl-D) ...")
