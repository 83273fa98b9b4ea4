"""Where the events of requests go in the engine's thread, on their way to callers in other threads. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herd.chat.format import Delta
from herd.chat.model import Reply, Usage
from herd.engine.completion import Collector, Completion
from herd.engine.reply import ReplyBuilder
from herd.engine.request import Finish, Request, TokenEvent
from herd.errors import HerdError

__all__ = ["CompletionSink", "LogitsSink", "ReplySink"]


def _future() -> Future[Any]:
    """A result to come that nobody can cancel: requests are aborted instead."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class CompletionSink:
    """Collects a request with any number of continuations; `future` gets its Completion."""

    def __init__(self, collector: Collector, on_done: Callable[[Completion], None] | None = None) -> None:
        self.future: Future[Completion] = _future()
        self._collector, self._on_done = collector, on_done

    def push(self, event: TokenEvent) -> bool:
        """As `Sink.push`."""
        complete = self._collector.push(event)
        if self._collector.done and not self.future.done():
            completion = self._collector.completion()
            if self._on_done is not None:
                self._on_done(completion)
            self.future.set_result(completion)
        return complete

    def fail(self, error: BaseException) -> None:
        """As `Sink.fail`."""
        if not self.future.done():
            self.future.set_exception(error)


class LogitsSink:
    """For a request of one token: `future` gets the logits [V] that it was chosen from."""

    def __init__(self) -> None:
        self.future: Future[NDArray[np.float32]] = _future()

    def push(self, event: TokenEvent) -> bool:
        """As `Sink.push`."""
        if event.logits is not None:
            self.future.set_result(event.logits)
        elif not self.future.done():
            self.fail(HerdError(event.error or "the request was ended"))
        return False

    def fail(self, error: BaseException) -> None:
        """As `Sink.fail`."""
        if not self.future.done():
            self.future.set_exception(error)


class ReplySink:
    """Builds one chat reply; `put` gets every delta and then None, `future` the Reply."""

    def __init__(
        self,
        request: Request,
        builder: ReplyBuilder,
        notes: tuple[str, ...],
        put: Callable[[Delta | None], None] | None = None,
    ) -> None:
        self.future: Future[Reply] = _future()
        self._request, self._builder, self._notes, self._put = request, builder, notes, put
        self._began = self._first = time.perf_counter()
        self._cached = 0

    def push(self, event: TokenEvent) -> bool:
        """As `Sink.push`."""
        builder = self._builder
        self._cached = max(self._cached, event.cached_tokens)
        if event.token is not None and not builder.done:
            if not builder.tokens:
                self._first = time.perf_counter()
            self._show(builder.push(event.token))
        if event.finish is not None and not self.future.done():
            self._end(event.finish, event.error)
        return builder.done

    def fail(self, error: BaseException) -> None:
        """As `Sink.fail`."""
        if not self.future.done():
            self.future.set_exception(error)
            if self._put is not None:
                self._put(None)

    def _end(self, finish: Finish, error: str | None) -> None:
        if finish == "error":
            self.fail(HerdError(error or "the request failed"))
            return
        builder = self._builder
        self._show(builder.close())
        now = time.perf_counter()
        made = len(builder.tokens)
        usage = Usage(
            len(self._request.prompt),
            made,
            self._cached,
            self._first - self._began,
            now - self._first if made else 0.0,
        )
        reason = "stop" if builder.ended else finish
        self.future.set_result(Reply(builder.message(), builder.tokens, reason, usage, self._notes))
        if self._put is not None:
            self._put(None)

    def _show(self, deltas: list[Delta]) -> None:
        if self._put is not None:
            for delta in deltas:
                self._put(delta)
