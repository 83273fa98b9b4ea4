"""The two halves of a prompt format: messages to ids, and generated text back to messages. No torch.

`Rendered` carries ids and loss mask from one pass, so what is trained is what is served. Rendering goes straight to ids:
there is never a prompt string that is tokenised again, so user text cannot forge special tokens and BOS appears once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from herd.chat.messages import Message, StopReason, ToolCall

__all__ = ["CallPart", "ChatFormat", "Delta", "Rendered", "StreamParser", "ToolSpec"]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function the model may call. `parameters` is a JSON Schema of type object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as ids. `loss_mask` has one bool per token: True where an assistant wrote it (the ids a model learns).

    `notes` says in plain words what the format had to decide on its own (for example a built-in policy text), if anything.
    """

    tokens: list[int]
    loss_mask: list[bool]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.loss_mask)


@dataclass(frozen=True, slots=True)
class CallPart:
    """More of a tool call that is not finished, the reply's `number`-th: its name first, then its arguments (JSON) in pieces."""

    number: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of a reply: more text, a finished tool call, or the end. Exactly one field is set.

    `part` comes only of replies that a grammar holds to calls (`herd.chat.promised`), before the finished call itself.
    """

    text: str | None = None
    tool_call: ToolCall | None = None
    stop_reason: StopReason | None = None
    part: CallPart | None = None


class StreamParser(Protocol):
    """Ids of a reply in, deltas out. Feeding ids one by one or all at once gives the same message."""

    def push(self, id: int) -> list[Delta]:
        """Take one generated id (stop ids included)."""
        ...

    def close(self) -> list[Delta]:
        """No more ids: whatever was held back, and a stop reason when none was seen (out_of_tokens)."""
        ...

    def message(self) -> Message:
        """The assistant message so far."""
        ...


class ChatFormat(Protocol):
    """One generation's prompt format over one tokenizer."""

    name: str
    stop_ids: frozenset[int]

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, generate: bool = True) -> Rendered:
        """Ids and loss mask of a conversation.

        `generate` opens the assistant's reply at the end (for sampling); False renders finished conversations (for
        training). Raises PromptError when the format cannot express the conversation, saying what to change.
        """
        ...

    def parser(self, tools: Sequence[ToolSpec] | None = ()) -> StreamParser:
        """A fresh parser for one reply. Calls of `tools` are looked for in its text (None: of any name)."""
        ...
