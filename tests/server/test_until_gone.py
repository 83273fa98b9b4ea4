"""Work that ends when its client goes."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request

from herd.server.sse import until_gone


def test_a_cancelled_caller_is_told_when_the_work_has_ended() -> None:
    """A batch says "cancelled" then, and nothing of it may still be running."""

    async def run() -> None:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
                ended.set()

        async def receive() -> dict[str, str]:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        caller = asyncio.create_task(until_gone(Request({"type": "http"}, receive), work()))
        await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert ended.is_set()

    asyncio.run(run())


def test_a_client_that_goes_ends_the_work_and_gets_nothing() -> None:
    async def run() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(asyncio.sleep(60))
        assert await until_gone(Request({"type": "http"}, receive), work) is None
        assert work.cancelled()

    asyncio.run(run())
