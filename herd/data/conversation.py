"""Conversations of data files as messages, held against what a chat model can be taught from. No torch.

What is checked here holds for every prompt format: who speaks after whom, that something is said, that tool results answer
calls. What a single format cannot express (Llama 2 has no tools) is found when the conversation is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from herd.chat.format import ToolSpec
from herd.chat.messages import Image, Message, ToolCall
from herd.chat.render import messages_from
from herd.chat.toolspec import BUILTIN_TOOLS, tools_from
from herd.data.read import type_name
from herd.data.report import RowReport
from herd.errors import DataError, PromptError

__all__ = ["check_prompt", "check_reply", "conversation", "messages_in", "tools_of"]


def conversation(value: Any, where: str, report: RowReport) -> tuple[Message, ...]:
    """Messages of a list as OpenAI, Hugging Face or Llama write it; an empty system message is left out and counted.

    `where` names the field in messages. Raises DataError.
    """
    try:
        messages = messages_from([_plain(item, i) for i, item in enumerate(messages_in(value, where))])
    except PromptError as error:
        raise DataError(str(error)) from error
    for i, message in enumerate(messages):
        if any(isinstance(part, Image) for part in message.parts):
            raise DataError(f"message {i} ({message.role}) holds an image: training reads text only")
        try:
            message.text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"message {i} ({message.role}) holds half a surrogate pair") from None
    if messages[0].role == "system" and not messages[0].text.strip():
        report.change("an empty system message was left out")
        messages = messages[1:]
        if not messages:
            raise DataError(f"{where} holds an empty system message and nothing else")
    return messages


def messages_in(value: Any, where: str) -> list[Any]:
    """`value`, which `where` names, as the list that it has to be. Raises DataError."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else "missing" if value is None else type_name(value)
        raise DataError(f"{where} is {found}, expected a list of messages")
    return value


def _plain(item: Any, i: int) -> Any:
    """A message without the fields that only say the usual, and with OpenAI's older `function_call` as a tool call."""
    if not isinstance(item, Mapping):
        return item
    item = dict(item)
    weight = item.pop("weight", None)
    if weight not in (None, 1):
        raise DataError(
            f"message {i}: weight {weight!r}: single messages cannot be left out of the loss; a prompt can, "
            "in rows with prompt and completion"
        )
    call = item.pop("function_call", None)
    if call:
        item["tool_calls"] = [*(item.get("tool_calls") or ()), call]
    return item


def tools_of(fields: Mapping[str, Any]) -> tuple[ToolSpec, ...]:
    """The tools of a row: `tools` (or OpenAI's older `functions`), a list or that list as JSON text. Raises DataError."""
    value = fields.get("tools") or fields.get("functions") or ()
    if isinstance(value, str):
        try:
            value = json.loads(value) or ()
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools is text that is not JSON ({error})") from error
    try:
        return tools_from(value)
    except PromptError as error:
        raise DataError(str(error)) from error


def check_reply(messages: Sequence[Message], tools: Sequence[ToolSpec], report: RowReport, start: int = 0) -> None:
    """Hold a finished conversation against the order of speakers; `start` is where its reply begins.

    After an optional system message, user and assistant alternate, the user first and the assistant last; an assistant that
    calls tools is followed by a result for each call, and then speaks again (or ends the conversation with its calls).
    Raises DataError naming the message.
    """
    _check_order(messages, tools, report)
    last = messages[-1].role
    if last != "assistant":
        raise DataError(f"the conversation ends with a {last} message: there is no reply to learn")
    if all(message.role != "assistant" for message in messages[start:]):
        raise DataError("no assistant message to learn from")


def check_prompt(messages: Sequence[Message], tools: Sequence[ToolSpec], report: RowReport) -> None:
    """The same for a conversation that waits for its reply: it ends with a user message or a tool's result."""
    _check_order(messages, tools, report)
    if messages[-1].role not in ("user", "tool"):
        raise DataError(f"the prompt ends with a {messages[-1].role} message: a reply follows a user or a tool")


def _check_order(messages: Sequence[Message], tools: Sequence[ToolSpec], report: RowReport) -> None:
    known = {tool.name for tool in tools} | BUILTIN_TOOLS.keys()
    before = "start"
    waiting: list[ToolCall] = []
    for i, message in enumerate(messages):
        role = message.role
        if role == "system":
            if i:
                raise DataError(f"message {i} is a system message: only the first message can be one")
            before = "start"
            continue
        if waiting and role != "tool":
            raise DataError(f"message {i} ({role}) comes before the result of {waiting[0].name}, which was called")
        if role not in _FOLLOWS[before]:
            raise DataError(f"message {i} has role {role} {_AFTER[before]}: expected {' or '.join(_FOLLOWS[before])}")
        if role == "tool":
            _answer(i, message, waiting)
        elif not message.text.strip() and not message.tool_calls:
            raise DataError(f"message {i} ({role}) has no text")
        if message.tool_calls:
            waiting = _called(i, message, known if tools else None, report)
        before = "calls" if message.tool_calls else role
    if waiting and messages[-1].role == "tool":
        raise DataError(f"the conversation ends before the result of {waiting[0].name}, which was called")


_FOLLOWS = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}
_AFTER = {
    "start": "at the start",
    "user": "after a user message",
    "assistant": "after an assistant message",
    "calls": "after tool calls",
    "tool": "after a tool's result",
}


def _called(i: int, message: Message, known: set[str] | None, report: RowReport) -> list[ToolCall]:
    calls = list(message.tool_calls)
    ids = [call.id for call in calls if call.id is not None]
    if ids and len(ids) != len(calls):
        raise DataError(f"message {i}: a tool call has no id while another has one")
    if len(set(ids)) != len(ids):
        raise DataError(f"message {i}: two tool calls have the same id")
    for call in calls:
        if known is not None and call.name not in known:
            raise DataError(f"message {i} calls {call.name!r}, which is not among the tools of the row")
    if known is None:
        report.change("calls tools that the row does not describe")
    return calls


def _answer(i: int, message: Message, waiting: list[ToolCall]) -> None:
    """Take the call that a tool message answers from `waiting`: the one with its id, or the first."""
    if not waiting:
        raise DataError(f"message {i} is one tool result more than there were calls")
    given = message.tool_call_id
    if waiting[0].id is None and given is not None:
        raise DataError(f"message {i} answers call {given!r}, and the calls have no ids")
    if waiting[0].id is not None and given is None:
        raise DataError(f"message {i} is a tool result without tool_call_id, and the calls have ids")
    at = next((n for n, call in enumerate(waiting) if call.id == given), None)
    if at is None:
        raise DataError(f"message {i} answers call {given!r}, which was not made")
    if message.name is not None and message.name != waiting[at].name:
        raise DataError(f"message {i} is a result of {message.name!r} where {waiting[at].name!r} was called")
    del waiting[at]
