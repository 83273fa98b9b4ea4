"""The stream parser of every format: ids of a reply in, text, tool calls and the stop reason out. No torch.

Built from two machines: the tokenizer's `Detokenizer` (ids to whole characters) and `CallScanner` (text to calls). Special ids
never reach the text: stop ids end the reply, and the code markers (`<|python_tag|>`, `<|python_start|>`) open a segment that
is a tool call whatever it holds: calls in any dialect where it reads as such, python source for the code interpreter
otherwise (the order of llama-models tool_utils.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from herd.chat.format import Delta, ToolSpec
from herd.chat.messages import Message, StopReason, ToolCall
from herd.chat.toolcalls import CallScanner, parse_calls
from herd.tokenizer.stream import Detokenizer
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["ReplyParser", "Stops"]


@dataclass(frozen=True, slots=True)
class Stops:
    """Which ids end a turn, and which end a message that waits for a tool."""

    turn: Collection[int]
    message: Collection[int] = ()


class ReplyParser:
    """One reply. `tools` are the functions whose calls are looked for in the text (None: any name, empty: none).

    Ids one by one or all at once, and text in any pieces (`push_text`), give the same message. A malformed call is text; a
    call cut off by a limit is text too, so half a program never runs. `strip` drops white space around the whole text, for
    formats that write ` answer ` between tags. `follows_text`: the reply goes on with a text, so its leading space counts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Stops,
        tools: Sequence[ToolSpec] | None = (),
        *,
        code_start: int | None = None,
        code_end: int | None = None,
        strip: bool = False,
        follows_text: bool = False,
    ) -> None:
        self._stops = stops
        self._code_start, self._code_end = code_start, code_end
        self._detokenizer = Detokenizer(tokenizer, follows_text=follows_text)
        self._names = None if tools is None else [tool.name for tool in tools]
        self._scanner = CallScanner(self._names)
        self._code: list[str] | None = None  # source since the code marker; None outside
        self._source = ""  # a closed code segment: what follows decides whether it is code or words before a call
        self._strip = strip
        self._held = ""  # white space that may turn out to be the end of the text
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._stop: StopReason | None = None

    def leading_calls_only(self) -> None:
        """From now on, a reply that begins as text is text to its end. To be said before the first id."""
        self._scanner = CallScanner(self._names, leading_only=True)

    def push(self, id: int) -> list[Delta]:
        """Take one generated id. Ids behind a stop id are ignored."""
        if self._stop is not None:
            return []
        if id in self._stops.turn:
            return self._end("end_of_turn")
        if id in self._stops.message:
            return self._end("end_of_message")
        if id not in (self._code_start, self._code_end):
            return self.push_text(self._detokenizer.push(id))
        out = self.push_text(self._detokenizer.flush())
        if id == self._code_start and self._code is None:
            out += self._emit(self._scanner.finish())
            self._code = []
        elif id == self._code_end and self._code is not None:
            out += self._close_code(complete=True)
        return out

    def push_text(self, text: str) -> list[Delta]:
        """Take generated text that was detokenized elsewhere."""
        if self._stop is not None or not text:
            return []
        if self._code is not None:
            self._code.append(text)
            return []
        return self._emit(self._scanner.feed(text))

    def close(self) -> list[Delta]:
        """No more ids. Without a stop id before, the reply ran out of tokens."""
        return [] if self._stop is not None else self._end("out_of_tokens")

    def message(self) -> Message:
        """The assistant message so far: what the deltas said."""
        return Message("assistant", "".join(self._content), tuple(self._calls), self._stop)

    def _end(self, reason: StopReason) -> list[Delta]:
        out = self.push_text(self._detokenizer.flush())
        if self._code is not None:
            out += self._close_code(complete=reason != "out_of_tokens")
        out += self._emit(self._scanner.finish())
        out += self._settle(words=False)
        self._stop = reason
        return [*out, Delta(stop_reason=reason)]

    def _close_code(self, *, complete: bool) -> list[Delta]:
        """What stood behind the code marker: calls, else source that waits for what follows, else text cut short."""
        assert self._code is not None
        source, self._code = "".join(self._code), None
        out = self._settle(words=False)
        self._scanner = CallScanner(self._names)
        calls = parse_calls(source)
        if calls is None and complete:
            self._source = source
            return out
        return out + self._emit([source] if calls is None else calls)

    def _settle(self, *, words: bool) -> list[Delta]:
        """Pass on a closed code segment: as `words` (Llama 4's template puts the content there before a call) or as code."""
        source, self._source = self._source, ""
        if not source.strip():
            return []
        return self._emit([source if words else ToolCall("code_interpreter", {"code": source})])

    def _emit(self, found: Sequence[str | ToolCall]) -> list[Delta]:
        out: list[Delta] = []
        for item in found:
            if self._source:
                out += self._settle(words=isinstance(item, ToolCall))
            if isinstance(item, ToolCall):
                self._calls.append(item)
                out.append(Delta(tool_call=item))
            elif text := self._stripped(item):
                self._content.append(text)
                out.append(Delta(text=text))
        return out

    def _stripped(self, text: str) -> str:
        if not self._strip:
            return text
        text = self._held + text if self._content else text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept
