"""What the prompt formats of Llama 3 and Llama 4 share: messages behind role headers. No torch.

    BOS  { START role END "\\n\\n" content CLOSE } ...  START "assistant" END "\\n\\n"

The role text, the two newlines, every text part and the calls are each encoded on their own, as Meta's chat_format.py does
(llama-models models/llama3 and models/llama4), so the ids are the same as there. The subclasses name the special tokens and
the rules for closing a message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from herd.chat.dialects import Dialect, dialect_named
from herd.chat.format import Rendered, ToolSpec
from herd.chat.messages import Message, StopReason, Text, ToolCall
from herd.chat.reply import ReplyParser, Stops
from herd.chat.toolspec import check_tools
from herd.chat.writer import TokenWriter, special_id
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["HeaderFormat", "HeaderTokens", "quoted"]

HEADER_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
"""Header text of every role: tool results stand behind `ipython` (models/llama3/chat_format.py)."""


@dataclass(frozen=True, slots=True)
class HeaderTokens:
    """Names of the special tokens of one generation. Without `code_end`, code runs to the end of the message."""

    start: str
    end: str
    turn: str
    message: str
    code_start: str
    code_end: str | None = None


class HeaderFormat:
    """Base of `Llama3Format` and `Llama4Format`; the options are described there."""

    tokens: ClassVar[HeaderTokens]

    def __init__(self, tokenizer: Tokenizer, *, name: str, dialect: str | None, strip_content: bool) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.dialect: Dialect | None = None if dialect is None else dialect_named(dialect)
        self.strip_content = strip_content
        self._start = special_id(tokenizer, self.tokens.start, name)
        self._end = special_id(tokenizer, self.tokens.end, name)
        self._turn = special_id(tokenizer, self.tokens.turn, name)
        # The April 2024 vocabulary of Llama 3 has none of these; only conversations with tools need them.
        self._message = tokenizer.special.get(self.tokens.message)
        self._code_start = tokenizer.special.get(self.tokens.code_start)
        self._code_end = None if self.tokens.code_end is None else tokenizer.special.get(self.tokens.code_end)
        stops = {self._turn, self._message, *tokenizer.special.stop}
        self.stop_ids = frozenset(id for id in stops if id is not None)

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, generate: bool = True) -> Rendered:
        """Ids and loss mask of a conversation; `generate` opens the assistant's reply at the end.

        Raises PromptError for an empty conversation, images, tools or calls that the dialect cannot express, and tool turns
        in a vocabulary without the tokens for them.
        """
        if not messages:
            raise PromptError("there are no messages to render: give at least one")
        tools = check_tools(tools)
        if tools and self.dialect is None:
            raise PromptError(
                f"{self.name} was trained without tools: use a newer model, or the prompt format of one (llama3.1)"
            )
        turns = tuple(self._stripped(message) for message in messages) if self.strip_content else tuple(messages)
        writer = TokenWriter(self.tokenizer)
        writer.special(self.tokenizer.special.bos)
        for message in self.prepared(turns, tools):
            self._write(writer, message, tools)
        if generate:
            self._write_header(writer, "assistant")
        return writer.rendered()

    def parser(self, tools: Sequence[ToolSpec] | None = ()) -> ReplyParser:
        """A fresh parser for one reply. Calls of `tools` are looked for in its text (None: of any name)."""
        waiting = frozenset() if self._message is None else frozenset({self._message})
        stops = Stops(turn=self.stop_ids - waiting, message=waiting)
        return ReplyParser(self.tokenizer, stops, tools, code_start=self._code_start, code_end=self._code_end)

    def prepared(self, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...]) -> tuple[Message, ...]:
        """The conversation with the tools described in it."""
        return self.dialect.place(messages, tools) if tools and self.dialect is not None else messages

    def is_builtin_call(self, call: ToolCall, tools: Sequence[ToolSpec]) -> bool:
        """Whether `call` is written in the form of the built-in tools."""
        return False

    def waits(self, message: Message, tools: Sequence[ToolSpec]) -> bool:
        """Whether a message without a stop reason of its own closes with the end-of-message token."""
        raise NotImplementedError

    def _stripped(self, message: Message) -> Message:
        # As the HF templates: results of tools are left as they are.
        return message if message.role == "tool" else replace(message, content=message.text.strip())

    def _write_header(self, writer: TokenWriter, role: str) -> None:
        writer.special(self._start)
        writer.text(HEADER_ROLES[role])
        writer.special(self._end)
        writer.text("\n\n")

    def _write(self, writer: TokenWriter, message: Message, tools: tuple[ToolSpec, ...]) -> None:
        self._write_header(writer, message.role)
        self._write_body(writer, message, tools)
        stop: StopReason | None = message.stop_reason
        waits = stop == "end_of_message" or (stop is None and self.waits(message, tools))
        # A reply that was cut off is closed so that the next turn is well formed, but nobody shall learn to stop there.
        learn = message.role == "assistant" and stop != "out_of_tokens"
        writer.special(self._close_id(waits), learn=learn)

    def _write_body(self, writer: TokenWriter, message: Message, tools: tuple[ToolSpec, ...]) -> None:
        self._write_content(writer, message)
        if message.tool_calls:
            self._write_calls(writer, message.tool_calls, tools)

    def _write_content(self, writer: TokenWriter, message: Message) -> None:
        for part in message.parts:
            if not isinstance(part, Text):
                raise PromptError(
                    f"the {self.name} format takes text only, and a {message.role} message holds an image"
                )
            writer.text(part.text, learn=message.role == "assistant")

    def _close_id(self, waits: bool) -> int:
        if not waits:
            return self._turn
        if self._message is None:
            raise PromptError(
                f"{self.name}: this tokenizer has no {self.tokens.message}, so a message cannot wait for a tool: "
                "set stop_reason to 'end_of_turn'"
            )
        return self._message

    def _write_calls(self, writer: TokenWriter, calls: Sequence[ToolCall], tools: tuple[ToolSpec, ...]) -> None:
        if self.dialect is None:
            raise PromptError(
                f"{self.name} was trained without tools and cannot write calls: use a newer model, or the prompt format of one "
                "(llama3.1)"
            )
        code = [call for call in calls if call.name == "code_interpreter" and set(call.arguments) == {"code"}]
        if code and self._code_start is not None:
            if len(calls) > 1:
                raise PromptError(
                    "a message that runs code holds no other call: code goes on to the end of the message"
                )
            writer.special(self._code_start, learn=True)
            writer.text(str(code[0].arguments["code"]), learn=True)
            if self._code_end is not None:
                writer.special(self._code_end, learn=True)
            return
        builtin = [call for call in calls if self.is_builtin_call(call, tools)]
        if builtin and len(builtin) < len(calls):
            raise PromptError("built-in tools and other functions cannot be called in one message: use two messages")
        if builtin:
            self._write_builtin(writer, builtin)
            return
        writer.text(self.dialect.print(calls), learn=True)

    def _write_builtin(self, writer: TokenWriter, calls: Sequence[ToolCall]) -> None:
        """Calls for which `is_builtin_call` holds; formats without built-in tools never get here."""
        raise NotImplementedError


def quoted(message: Message) -> Message:
    """A tool result as a JSON string, which is what the HF templates make of text."""
    return replace(message, content=json.dumps(message.text, ensure_ascii=False))
