"""What a training example is before it becomes tokens: plain text, or a conversation. No torch.

Rows are dictionaries as `herd.data.read.read_rows` gives them; the two `from_row` functions are the only places that know the
field names of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from herd.data.read import DataError

__all__ = ["ChatRecord", "TextRecord", "Turn"]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One document. `source` names where it came from, for attribution and error messages."""

    text: str
    title: str = ""
    source: str = ""

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> TextRecord:
        """A row with a non-empty string `text`; `title` and `source` are optional."""
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"row {row.get('id', '?')}: text is missing or empty")
        return TextRecord(text, str(row.get("title") or ""), str(row.get("source") or ""))


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation: who speaks, and what."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """One conversation, in order. `source` names where it came from."""

    turns: tuple[Turn, ...]
    source: str = ""

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> ChatRecord:
        """A row with `messages`: a list of {role, content}. Tool calls are refused here, the tool formats read those."""
        messages = row.get("messages")
        name = row.get("id", "?")
        if not isinstance(messages, list) or not messages:
            raise DataError(f"row {name}: messages is missing or empty")
        turns: list[Turn] = []
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise DataError(f"row {name}: message {i} is not an object")
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise DataError(f"row {name}: message {i} has role {role!r}, expected one of {', '.join(ROLES)}")
            if not isinstance(content, str) or not content.strip():
                raise DataError(f"row {name}: message {i} ({role}) has no text")
            turns.append(Turn(role, content))
        if all(turn.role != "assistant" for turn in turns):
            raise DataError(f"row {name}: no assistant message to learn from")
        return ChatRecord(tuple(turns), str(row.get("source") or ""))

    @staticmethod
    def pairs(*texts: str, source: str = "") -> ChatRecord:
        """A conversation from alternating user and assistant texts."""
        if not texts or len(texts) % 2:
            raise DataError("a conversation needs a reply for every user text")
        roles = ("user", "assistant") * (len(texts) // 2)
        return ChatRecord(tuple(Turn(role, text) for role, text in zip(roles, texts, strict=True)), source)
