"""Work that ends when its client goes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request

from herd.server.sse import until_gone
from tests.server.conftest import faked


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


ASKING: dict[str, dict[str, Any]] = {
    "/v1/responses/input_tokens": {"model": "fake", "input": "Hi"},
    "/v1/messages/count_tokens": {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"model": "fake", "prompt": "Hi"},
    "/detokenize": {"model": "fake", "tokens": [5]},
    "/v1/embeddings": {"model": "fake", "input": "Hi"},
    "/v1/moderations": {"input": "Hi"},
    "/api/embed": {"model": "fake", "input": "Hi"},
    "/api/embeddings": {"model": "fake", "prompt": "Hi"},
}


@pytest.mark.parametrize("path", list(ASKING))
def test_questions_end_with_their_clients(path: str) -> None:
    """A model that never answers, a client that goes: nothing of it is left, and the next one finds the place free."""

    async def run() -> None:
        left, asked = asyncio.Event(), asyncio.Event()

        async def ask(what: str, **args: Any) -> Any:
            asked.set()
            try:
                await asyncio.sleep(60)
            finally:
                left.set()

        async with faked(guard="fake") as fake:
            await fake.state.models.load("fake")
            fake.model.ask = ask  # type: ignore[method-assign]
            app = fake.client._transport.app  # type: ignore[attr-defined]
            told = [{"type": "http.request", "body": json.dumps(ASKING[path]).encode(), "more_body": False}]

            async def receive() -> dict[str, Any]:
                if told:
                    return told.pop()
                await asked.wait()
                return {"type": "http.disconnect"}

            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {
                "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
                "raw_path": path.encode(), "query_string": b"", "headers": [(b"host", b"localhost")],
                "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
            }  # fmt: skip
            async with asyncio.timeout(20):
                await app(scope, receive, send)
            assert left.is_set(), "the question goes on"
            assert fake.state.models.slots["fake"].users == 0
            assert fake.state.visits == 0

    asyncio.run(run())
