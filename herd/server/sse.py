"""Server-sent events: a response that ends its source when the client is gone, and says that it is alive. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "EventStream", "event", "until_gone"]

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
SEND_SECONDS = 30.0
"""A client that takes nothing for so long is gone."""


def event(data: Any, name: str | None = None) -> bytes:
    """One event of JSON data."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """Sends what `source` gives (bytes). `source` is closed at once when the client goes away or takes nothing any more.

    Nothing is awaited of `source` before the response begins: what must be known before (a refusal) is to be found out by then.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncIterator[bytes],
        *,
        headers: Mapping[str, str] | None = None,
        ping_seconds: float = 15.0,
        media_type: str | None = None,
        ping: bytes = PING,
    ) -> None:
        super().__init__(None, 200, headers, media_type)
        del self.headers["content-length"]
        self.headers.setdefault("Cache-Control", "no-cache")
        self.headers.setdefault("X-Accel-Buffering", "no")
        self._source, self._ping_seconds, self._ping = source, ping_seconds, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            gone.cancel()
            for task in (sending, gone):
                with contextlib.suppress(asyncio.CancelledError, OSError, TimeoutError):
                    await task
            close = getattr(self._source, "aclose", None)
            if close is not None:
                await close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        source = self._source.__aiter__()
        following: asyncio.Task[bytes] | None = None
        try:
            while True:
                following = asyncio.ensure_future(anext(source))  # type: ignore[arg-type]
                while not (await asyncio.wait({following}, timeout=self._ping_seconds or None))[0]:
                    await _timely(send, self._ping)
                try:
                    data = following.result()
                except StopAsyncIteration:
                    break
                await _timely(send, data)
        finally:
            if following is not None and not following.done():
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                    await following
            elif following is not None and not following.cancelled():
                following.exception()  # its end came with that of the client: asyncio shall not report it as lost
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _timely(send: Send, data: bytes) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(request: Request, work: Any) -> Any:
    """What the coroutine `work` returns; it is cancelled when the client goes away first, and None is returned.

    The body must have been read.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        over = working.done()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait({working, gone})  # whoever is told that this has ended finds that the work has
        if not working.cancelled():
            working.exception()  # looked at, also where a cancelled caller does not ask for it
    return working.result() if over or not working.cancelled() else None
