"""From the ids of one reply to what its reader sees: deltas, cut at stop strings, and the finished message. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from herd.chat.format import Delta, StreamParser
from herd.chat.messages import Message, ToolCall
from herd.chat.params import SamplingParams
from herd.engine.stop import StopMatcher

__all__ = ["ReplyBuilder"]


class ReplyBuilder:
    """One reply while it is made. Feed it every id, then `close` it; both give the deltas to show.

    `stop_ids` are the prompt format's, `params` the caller's own stops. Once `done`, no more ids are wanted: a stop string was
    met, or `max_calls` tool calls are complete. `ended` says whether the model or a stop ended the reply, and not a limit.
    """

    def __init__(
        self, parser: StreamParser, params: SamplingParams, stop_ids: frozenset[int], *, max_calls: int | None = None
    ) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self._parser = parser
        self._matcher = StopMatcher(params.stop)
        self._go_on = params.ignore_stop_ids
        self._free = params.min_tokens
        """Tokens at the beginning in which no stop string is looked for."""
        # Ids that the parser must not see: stops that are ignored, and stops that only the caller knows.
        self._hidden = stop_ids | params.stop_ids if params.ignore_stop_ids else params.stop_ids - stop_ids
        self._shown: list[str] = []
        self._calls: list[ToolCall] = []
        self._max_calls = max_calls

    @property
    def done(self) -> bool:
        """Whether a stop string was met, or there are all the calls that were wanted."""
        return self._matcher.matched or len(self._calls) == self._max_calls

    @property
    def stop(self) -> str | None:
        """The stop string that was met."""
        return self._matcher.met

    def push(self, token: int) -> list[Delta]:
        """Take one generated id, stop ids included."""
        self.tokens.append(token)
        if token in self._hidden:
            self.ended = not self._go_on
            return []
        return self._pass_on(self._parser.push(token))

    def close(self) -> list[Delta]:
        """No more ids: what was held back, and the stop reason."""
        if self.done:
            return [Delta(stop_reason="end_of_turn")]
        return self._pass_on(self._parser.close())

    def message(self) -> Message:
        """The assistant message so far."""
        message = self._parser.message()
        if self.done:
            return Message("assistant", "".join(self._shown), tuple(self._calls))
        if self.ended and message.stop_reason == "out_of_tokens":
            return replace(message, stop_reason="end_of_turn")
        return message

    def _pass_on(self, deltas: Sequence[Delta]) -> list[Delta]:
        out: list[Delta] = []
        for delta in deltas:
            if delta.text is not None:
                free = len(self.tokens) <= self._free
                self._show(delta.text if free else self._matcher.push(delta.text), out)
                if self.done:
                    self.ended = True
                    break
                continue
            self._show(self._matcher.flush(), out)
            if self.ended and delta.stop_reason == "out_of_tokens":  # a caller's stop id, unknown to the parser
                delta = Delta(stop_reason="end_of_turn")
            self.ended = self.ended or delta.stop_reason in ("end_of_turn", "end_of_message")
            out.append(delta)
            if delta.tool_call is not None:
                self._calls.append(delta.tool_call)
                if self.done:
                    self.ended = True
                    break
        return out

    def _show(self, text: str, out: list[Delta]) -> None:
        if text:
            self._shown.append(text)
            out.append(Delta(text=text))
