"""What a training example is before it becomes tokens: text, a conversation, a prompt with what follows it. No torch.

`herd.data.adapt` makes records of rows; nothing else knows the field names of files. Conversations are messages of
`herd.chat.messages`, so that every prompt format takes them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from herd.chat.format import ToolSpec
from herd.chat.messages import Message
from herd.errors import DataError

__all__ = ["ChatRecord", "CompletionRecord", "PreferenceRecord", "PromptRecord", "Record", "TextRecord", "text_of"]

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One document. `source` names where it came from, for attribution; `where` is its `file:line`."""

    text: str
    title: str = ""
    source: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """One conversation, in order, and the tools that its assistant may call.

    The first `given` messages are a prompt: no loss on them, assistant messages among them included (TRL's conversational
    prompt/completion rows). 0, the rule, learns every assistant message.
    """

    messages: Messages
    tools: tuple[ToolSpec, ...] = ()
    given: int = 0
    source: str = ""
    where: str = field(default="", compare=False)

    @staticmethod
    def pairs(*texts: str, source: str = "") -> ChatRecord:
        """A conversation from alternating user and assistant texts."""
        if not texts or len(texts) % 2:
            raise DataError("a conversation needs a reply for every user text")
        turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
        return ChatRecord(tuple(turns), source=source)


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """A text and how it goes on; only `completion` is learned. Both are taken as they are, with no space put between."""

    prompt: str
    completion: str
    source: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """Two ways a prompt goes on, the first better than the second. All three are texts, or all three are messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: tuple[ToolSpec, ...] = ()
    source: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt alone, for methods that let the model reply; `answer` is what a reply can be checked against, if known."""

    prompt: str | Messages
    tools: tuple[ToolSpec, ...] = ()
    answer: str = ""
    source: str = ""
    where: str = field(default="", compare=False)


Record = TextRecord | ChatRecord | CompletionRecord | PreferenceRecord | PromptRecord


def text_of(record: Record) -> str:
    """Everything in a record that a model may read, as one text: what duplicates and leaks are looked for in."""
    if isinstance(record, TextRecord):
        return record.text
    if isinstance(record, CompletionRecord):
        return f"{record.prompt}{record.completion}"
    if isinstance(record, ChatRecord):
        return _said(record.messages)
    parts = (
        (record.prompt, record.chosen, record.rejected) if isinstance(record, PreferenceRecord) else (record.prompt,)
    )
    return "\n".join(part if isinstance(part, str) else _said(part) for part in parts)


def _said(messages: Messages) -> str:
    lines: list[str] = []
    for message in messages:
        said = "".join(getattr(part, "text", "") for part in message.parts)
        lines += [said] if said else []
        lines += [f"{call.name} {_json(call.arguments)}" for call in message.tool_calls]
    return "\n".join(lines)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), ensure_ascii=False, sort_keys=True, default=str)
