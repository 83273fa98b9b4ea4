"""What a conversation is made of: frozen dataclasses, no behaviour beyond construction checks. No torch.

Words follow llama-models models/datatypes.py: roles, tool calls, stop reasons. The role of a tool result is "tool" in every
format; formats write it with the header their model was trained on (Llama 3 and 4: `ipython`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from herd.errors import PromptError

__all__ = ["Image", "Message", "Part", "Role", "StopReason", "Text", "ToolCall"]

Role = Literal["system", "user", "assistant", "tool"]
StopReason = Literal["end_of_turn", "end_of_message", "out_of_tokens"]
"""end_of_turn: the reply is complete. end_of_message: the model waits for a tool result. out_of_tokens: cut by a limit."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text content."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image by its source: encoded bytes, or a path. Decoding belongs to the vision floor."""

    data: bytes | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.data is None) == (self.path is None):
            raise PromptError("an image needs exactly one of data or path")


Part = Text | Image


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call. `arguments` are JSON values; `id` ties a result to its call when the caller uses ids.

    The name `code_interpreter` with the single argument `code` stands for python source after `<|python_tag|>`.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is text, or parts when images are mixed in. Raises PromptError on an unknown role, fields that
    the role cannot carry, and values of wrong types.

    `tool_calls` and `stop_reason` belong to assistant messages. The stop reason "end_of_message" marks a turn that waits for
    tools; None lets the format decide (end_of_message exactly when the format's own rule says so).
    `name` is the tool's name on a tool message; `tool_call_id` repeats the id of the call it answers.
    """

    role: Role
    content: str | tuple[Part, ...] = ""
    tool_calls: tuple[ToolCall, ...] = ()
    stop_reason: StopReason | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise PromptError(f"message role {self.role!r} is not one of {', '.join(get_args(Role))}")
        if isinstance(self.content, list):
            object.__setattr__(self, "content", tuple(self.content))
        if isinstance(self.tool_calls, list):
            object.__setattr__(self, "tool_calls", tuple(self.tool_calls))
        if self.role != "assistant":
            for field_name, value in (("tool calls", self.tool_calls), ("a stop reason", self.stop_reason)):
                if value:
                    raise PromptError(f"a {self.role} message cannot carry {field_name}: only assistant messages can")
        if self.stop_reason is not None and self.stop_reason not in get_args(StopReason):
            raise PromptError(f"stop reason {self.stop_reason!r} is not one of {', '.join(get_args(StopReason))}")
        self._check_types()

    def _check_types(self) -> None:
        where = f"content of a {self.role} message"
        if not isinstance(self.content, str | tuple):
            raise PromptError(f"{where} is a {type(self.content).__name__}, expected text or parts")
        parts = () if isinstance(self.content, str) else self.content
        for part in parts:
            if not isinstance(part, Text | Image):
                raise PromptError(f"{where} holds a {type(part).__name__}, expected Text and Image parts")
        for call in self.tool_calls:
            if not isinstance(call, ToolCall):
                raise PromptError(f"tool_calls hold a {type(call).__name__}, expected ToolCalls")

    @property
    def text(self) -> str:
        """The text of the content; raises PromptError when it holds an image."""
        if isinstance(self.content, str):
            return self.content
        if any(isinstance(part, Image) for part in self.content):
            raise PromptError("this prompt format takes text only, and the message holds an image")
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def parts(self) -> Sequence[Part]:
        """The content as parts."""
        return (Text(self.content),) if isinstance(self.content, str) else self.content
