"""Replies on their way from the engine's thread to a caller: waited for, or taken delta by delta."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import Future

from herd.chat.format import Delta
from herd.chat.model import Reply
from herd.engine.loop import Loop

__all__ = ["AsyncReplyStream", "Pending", "ReplyStream"]


class Pending:
    """A reply on its way: `future` gets it, `close` ends it early."""

    def __init__(self, id: str, future: Future[Reply], loop: Loop) -> None:
        self.id, self.future, self._loop = id, future, loop

    def wait(self) -> Reply:
        """The reply, when it is there."""
        return self.future.result()

    def close(self) -> None:
        """End it, if it has not ended."""
        if not self.future.done():
            self._loop.abort(self.id)


class ReplyStream:
    """Deltas of one reply; `reply` when they have ended. Also a context manager that ends the request when it is left."""

    def __init__(self, started: Pending, found: queue.SimpleQueue[Delta | None]) -> None:
        self._started, self._found = started, found
        self._over = False

    @property
    def reply(self) -> Reply:
        """The whole reply; waits for its end. Raises HerdError when the request failed."""
        return self._started.wait()

    def close(self) -> None:
        """End the request; `reply` then holds what there was."""
        self._started.close()

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> Delta:
        if self._over:
            raise StopIteration
        delta = self._found.get()
        if delta is None:
            self._over = True
            self._started.wait()  # raises what went wrong
            raise StopIteration
        return delta

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncReplyStream:
    """The same for `async for`. `await stream.reply()` gives the whole; cancelling or `aclose` ends the request."""

    def __init__(self, started: Pending, found: asyncio.Queue[Delta | None]) -> None:
        self._started, self._found = started, found
        self._over = False

    async def reply(self) -> Reply:
        """The whole reply; waits for its end. Raises HerdError when the request failed."""
        return await asyncio.wrap_future(self._started.future)

    async def aclose(self) -> None:
        """End the request; `reply` then holds what there was."""
        self._started.close()

    def __aiter__(self) -> AsyncReplyStream:
        return self

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        try:
            delta = await self._found.get()
        except BaseException:
            self._started.close()
            raise
        if delta is None:
            self._over = True
            self._started.wait()  # there already: raises what went wrong
            raise StopAsyncIteration
        return delta

    async def __aenter__(self) -> AsyncReplyStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._started.close()

    def __del__(self) -> None:
        self._started.close()
