"""Checks shared by the formats that know only system, user and assistant in strict alternation. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from herd.chat.format import ToolSpec
from herd.chat.messages import Message
from herd.errors import PromptError

__all__ = ["check_turns", "shared_prefix"]


def check_turns(
    messages: Sequence[Message], tools: Sequence[ToolSpec], format: str, *, generate: bool
) -> tuple[Message, ...]:
    """The turns behind an optional system message: user and assistant in alternation, the user first.

    With `generate` the user must have the last word. Raises PromptError naming the message that is out of place, and for
    tools, which these formats have no words for.
    """
    if tools:
        raise PromptError(f"the {format} format has no tools: use a Llama 3.1 or newer model, or leave the tools out")
    if not messages:
        raise PromptError("there are no messages to render: give at least one")
    first = 1 if messages[0].role == "system" else 0
    turns = tuple(messages[first:])
    for i, message in enumerate(turns):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            raise PromptError(
                f"message {first + i} has role {message.role!r} where the {format} format needs {expected!r}: "
                "after an optional system message, user and assistant alternate"
            )
        if message.tool_calls:
            raise PromptError(f"message {first + i} calls tools, and the {format} format has no tools")
    if not turns:
        raise PromptError(f"the {format} format needs a user message; there is only a system message")
    if generate and turns[-1].role != "user":
        raise PromptError(
            f"the conversation ends with an assistant message: the {format} format answers a user message"
        )
    return turns


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids both begin with."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
