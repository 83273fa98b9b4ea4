"""Server-sent events: a response that ends its source when the client is gone, and says that it is alive. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

__all__ = ["DONE", "EventStream", "TextFrame", "event", "until_gone"]

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
SEND_SECONDS = 30.0
"""A client that takes nothing for so long is gone."""
HOLE = secrets.token_hex(16)
_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(data: Any, name: str | None = None) -> bytes:
    """One event of JSON data."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {_json(data)}\n\n".encode()


class TextFrame:
    """Events that differ in one string only: `event(make(text))`, where all that is the same was made once."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        self._before, self._after = make(HOLE).split(_json(HOLE).encode())

    def __call__(self, text: str) -> bytes:
        return b"%b%b%b" % (self._before, _json(text).encode(), self._after)


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
        self._sending, self._last = False, 0.0
        """Whether something is being sent, and when the last sending began."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last = asyncio.get_running_loop().time()
        sending = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(_disconnected(receive))
        watch = asyncio.create_task(self._watch(send))
        try:
            await asyncio.wait({sending, gone, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            gone.cancel()
            watch.cancel()
            for task in (sending, gone, watch):
                with contextlib.suppress(asyncio.CancelledError, OSError, TimeoutError):
                    await task
            close = getattr(self._source, "aclose", None)
            if close is not None:
                await close()

    async def _send_all(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await self._send(send, head)
        async for data in self._source:
            await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        self._sending, self._last = True, asyncio.get_running_loop().time()
        await send(message)
        self._sending = False

    async def _watch(self, send: Send) -> None:
        """Say that the stream is alive where nothing else was said; it ends when the client takes nothing any more.

        One task for all events: a timer for each would take longer than sending it.
        """
        clock = asyncio.get_running_loop().time
        while True:
            wait = SEND_SECONDS if self._sending or not self._ping_seconds else self._ping_seconds
            left = self._last + wait - clock()
            if left > 0:
                await asyncio.sleep(left)
            elif self._sending:
                return
            elif self._ping_seconds:
                async with asyncio.timeout(SEND_SECONDS):
                    await self._send(send, {"type": "http.response.body", "body": self._ping, "more_body": True})
            else:
                await asyncio.sleep(wait)


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
