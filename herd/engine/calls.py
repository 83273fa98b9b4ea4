"""Calls on their way: requests begun together, waited for, and all ended when one cannot begin or their caller is interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from herd.chat.format import Delta
from herd.chat.model import Reply
from herd.chat.params import SamplingParams
from herd.chat.toolspec import tools_from
from herd.engine.completion import Collector, Completion
from herd.engine.intake import Intake, is_conversation
from herd.engine.loop import Loop
from herd.engine.request import Request
from herd.engine.searches import Searches
from herd.engine.sinks import CompletionSink, ReplySink
from herd.engine.streams import Pending
from herd.errors import HerdError

__all__ = ["Calls", "checked"]

Asked = Sequence[tuple[Request, str | None]]
"""Requests with the texts of their prompts, as `Intake.requests` makes them."""


class Calls:
    """What callers wait for: completions and replies of `loop`, and of `searches` where a request has beams.

    `intake` makes requests of conversations. Methods may be called from any thread, their `a...` twins from any event loop.
    """

    def __init__(self, loop: Loop, intake: Intake, searches: Searches) -> None:
        self._loop, self._intake, self._searches = loop, intake, searches

    def completions(self, requests: Asked, on_done: Callable[[Completion], None] | None = None) -> list[Completion]:
        """Those of `requests`, in their order, failed ones among them: see `checked`. An interrupt ends all of them."""
        futures = self._submit(requests, on_done)
        try:
            return [future.result() for future in futures]
        except BaseException:
            self._abort(requests)
            raise

    async def acompletions(self, requests: Asked) -> list[Completion]:
        """As `completions`. Cancelling ends the requests."""
        futures = self._submit(requests, None)
        try:
            return await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        except BaseException:
            self._abort(requests)
            raise

    def replies(self, messages: Any, params: SamplingParams | None, tools: Any, adapter: str | None) -> Any:
        """The reply to a conversation, or a list of the replies to several. An interrupt ends all of them."""
        several, streams = self._chats(messages, params, tools, adapter)
        try:
            replies = [stream.wait() for stream in streams]
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return replies if several else replies[0]

    async def areplies(self, messages: Any, params: SamplingParams | None, tools: Any, adapter: str | None) -> Any:
        """As `replies`. Cancelling ends the requests."""
        several, streams = self._chats(messages, params, tools, adapter)
        try:
            replies: list[Reply] = await asyncio.gather(*(asyncio.wrap_future(stream.future) for stream in streams))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return replies if several else replies[0]

    def pending(
        self,
        prompt: Any,
        params: SamplingParams | None,
        tools: Any,
        adapter: str | None,
        put: Callable[[Delta | None], None] | None = None,
    ) -> Pending:
        """A reply to a text, ids or a conversation, not waited for. `put` gets its deltas in the engine's thread, then None."""
        return self._start(*self._intake.reply(prompt, params, tools_from(tools), "the prompt", adapter, put))

    def close(self) -> None:
        """Begin no more searches. What runs ends when the loop does."""
        self._searches.close()

    def _submit(self, requests: Asked, on_done: Callable[[Completion], None] | None) -> list[Future[Completion]]:
        futures = []
        try:
            for request, text in requests:
                if request.params.beams > 1:
                    futures.append(self._searches.submit(request, text, on_done))
                    continue
                sink = CompletionSink(Collector(request, self._intake.tokenizer, text), on_done)
                self._loop.submit(request, sink)
                futures.append(sink.future)
        except BaseException:
            self._abort(requests)
            raise
        return futures

    def _abort(self, requests: Asked) -> None:
        for request, _ in requests:
            if request.params.beams > 1:
                self._searches.abort(request.id)
            else:
                self._loop.abort(request.id)

    def _chats(
        self, messages: Any, params: SamplingParams | None, tools: Any, adapter: str | None
    ) -> tuple[bool, list[Pending]]:
        """Whether several conversations were given, and each of them begun."""
        several = len(messages) > 0 and not isinstance(messages, Mapping) and is_conversation(messages[0])
        specs = tools_from(tools)
        prepared = [
            self._intake.reply(one, params, specs, f"conversation {i}" if several else "the conversation", adapter)
            for i, one in enumerate(messages if several else [messages])
        ]
        started: list[Pending] = []
        try:
            for request, sink in prepared:
                started.append(self._start(request, sink))
        except BaseException:
            for one in started:
                one.close()
            raise
        return several, started

    def _start(self, request: Request, sink: ReplySink) -> Pending:
        self._loop.submit(request, sink)
        return Pending(request.id, sink.future, self._loop)


def checked(done: Sequence[Completion], errors: Literal["raise", "keep"]) -> list[Completion]:
    """All of `done`. Raises HerdError when one has failed, unless `errors` is "keep"."""
    failed = next((one for one in done if one.error is not None), None)
    if failed is not None and errors == "raise":
        count = sum(one.error is not None for one in done)
        more = f" ({count} of {len(done)} requests failed)" if len(done) > 1 else ""
        raise HerdError(f"{failed.error}{more}")
    return list(done)
