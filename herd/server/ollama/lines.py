"""Answers of Ollama's API: lines of JSON, one for each piece, or one object; times in nanoseconds. No torch."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from herd.errors import HerdError
from herd.server.errors import error_body, told
from herd.server.openai.replies import chat_logprob
from herd.server.protocol import Began, Ended, Event, Finished, Piece, Usage
from herd.server.sse import EventStream, until_gone

__all__ = ["NDJSON", "Answer", "Begun", "answered", "line", "moment"]

NDJSON = "application/x-ndjson"
Begun = tuple[Began, AsyncGenerator[Event, None]]
"""A call that was taken, and its other events."""


def line(data: Any) -> bytes:
    """One line of a stream."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def moment(seconds: float | None = None) -> str:
    """A time (now, where none is given) as Ollama writes it."""
    when = datetime.datetime.fromtimestamp(time.time() if seconds is None else seconds, datetime.UTC)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


class Answer:
    """A reply while it grows. `told(text, calls)` is what a piece says, in the words of its path."""

    def __init__(self, model: str, told: Callable[[str, list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._model, self._told = model, told
        self._arrived = time.monotonic()
        self._loaded = 0.0
        self._text: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[str] = []
        """Of the call that is being made."""
        self._logprobs: list[dict[str, Any]] = []
        self._ended: Ended | None = None
        self._usage: Usage | None = None

    def loaded(self) -> None:
        """The model is there."""
        self._loaded = time.monotonic() - self._arrived

    def take(self, one: Event) -> dict[str, Any] | None:
        """The next event; what a stream tells of it."""
        if isinstance(one, Finished):
            self._usage = one.usage
            return None
        if isinstance(one, Ended):
            self._ended = one
            done = self._completed()
            return self._line("", done) if done else None
        if not isinstance(one, Piece):
            return None
        calls: list[dict[str, Any]] = []
        if (tool := one.tool) is not None:
            if tool.name is not None:
                calls = self._completed()
                self._calls.append(
                    {"id": tool.id, "function": {"index": tool.number, "name": tool.name, "arguments": {}}}
                )
                self._arguments = []
            self._arguments.append(tool.arguments)
        logprobs = [_logprob(token) for token in one.tokens]
        self._text.append(one.text)
        self._logprobs += logprobs
        if not (one.text or calls or logprobs):
            return None
        return self._line(one.text, calls) | ({"logprobs": logprobs} if logprobs else {})

    def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        told = self._line("".join(self._text), self._calls) | self._end()
        return told | ({"logprobs": self._logprobs} if self._logprobs else {})

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
        """The answer as lines. An error on the way is a line, too."""
        try:
            async with contextlib.aclosing(events):
                async for one in events:
                    made = self.take(one)
                    if made is not None:
                        yield line(made)
            yield line(self._line("", []) | self._end())
        except HerdError as error:
            yield line(error_body(told(error, "a stream of Ollama's API"), "ollama"))

    def _line(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"model": self._model, "created_at": moment(), **self._told(text, calls), "done": False}

    def _completed(self) -> list[dict[str, Any]]:
        """The call that was being made, now that its arguments are there; once."""
        if not self._arguments:
            return []
        text, self._arguments = "".join(self._arguments), []
        with contextlib.suppress(ValueError):  # cut short by a limit, which done_reason says
            self._calls[-1]["function"]["arguments"] = json.loads(text)
        return [self._calls[-1]]

    def _end(self) -> dict[str, Any]:
        assert self._ended is not None
        assert self._usage is not None
        usage = self._usage
        return {
            "done": True,
            "done_reason": "length" if self._ended.reason == "length" else "stop",
            "total_duration": _nanoseconds(time.monotonic() - self._arrived),
            "load_duration": _nanoseconds(self._loaded),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(usage.prompt_seconds),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(usage.decode_seconds),
        }


async def answered(
    request: Request,
    answer: Answer,
    begin: Callable[[], Any],
    stream: bool,
) -> Response:
    """The response of a call. `begin()` is a coroutine that gives its Begun: what is wrong is raised there."""

    async def whole() -> Response:
        began, events = await begin()
        async with contextlib.aclosing(events):
            async for one in events:
                answer.take(one)
        return JSONResponse(answer.whole(), headers=_headers(began))

    if not stream:
        return await until_gone(request, whole()) or Response(status_code=499)
    taken: Begun | None = await until_gone(request, begin())
    if taken is None:
        return Response(status_code=499)
    # Lines have nothing like a comment: clients would read an empty one as JSON.
    return EventStream(answer.stream(taken[1]), media_type=NDJSON, headers=_headers(taken[0]), ping_seconds=0)


def _headers(began: Began) -> dict[str, str]:
    left = began.truncated
    if left is None:
        return {}
    return {"X-Herd-Truncated": f"messages={left.dropped_messages}; tokens={left.dropped_tokens}"}


def _logprob(token: Any) -> dict[str, Any]:
    told = chat_logprob(token)
    return told if token.top else {key: value for key, value in told.items() if key != "top_logprobs"}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
