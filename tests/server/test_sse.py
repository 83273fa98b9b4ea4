"""Streams of events: what is sent of them, when they say that they are alive, and when they end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from herd.server import sse
from herd.server.process import WorkerError
from herd.server.sse import EventStream, TextFrame, event
from herd.server.state import Running, until_stopped

SOON = 20.0
"""Seconds for what takes milliseconds, on a machine that others use, too."""


class Client:
    """An ASGI client: `taken` are the bodies that were sent to it. It takes no more of them than `room`."""

    def __init__(self, room: int = 1000) -> None:
        self.taken: list[bytes] = []
        self.room = room
        self.over = False
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            return
        if len(self.taken) >= self.room:
            await asyncio.sleep(SOON * 10)
        self.over = not message["more_body"]
        self.taken.append(message["body"])


class Source:
    """Gives its items, waits where one is a number of seconds, raises where one is an error; knows whether it was ended."""

    def __init__(self, *items: Any) -> None:
        self.items, self.ended = items, False

    async def run(self) -> AsyncIterator[Any]:
        try:
            for item in self.items:
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield item
        finally:
            self.ended = True


async def streamed(source: Source, client: Client, **options: Any) -> None:
    async with asyncio.timeout(SOON):
        await EventStream(source.run(), **options)({"type": "http"}, client.receive, client.send)
    assert source.ended


def test_all_of_it_is_sent_and_the_body_ends() -> None:
    async def run() -> None:
        client = Client()
        await streamed(Source(b"a", 0.01, b"b", b"c"), client)
        assert client.taken == [b"a", b"b", b"c", b""]
        assert client.over

    asyncio.run(run())


def test_a_quiet_stream_says_that_it_is_alive_and_a_busy_one_does_not() -> None:
    async def run() -> None:
        client = Client()
        await streamed(Source(b"a", 0.5, b"b", *([0.02, b"c"] * 20)), client, ping_seconds=0.2)
        assert client.taken[0] == b"a"
        assert 1 <= client.taken.count(sse.PING) <= 3, "the 20 that followed each other closely need none"
        assert sse.PING in client.taken[1:4]
        silent = Client()
        await streamed(Source(b"a", 0.3, b"b"), silent, ping_seconds=0)
        assert silent.taken == [b"a", b"b", b""]

    asyncio.run(run())


def test_a_client_that_goes_ends_the_source_at_once() -> None:
    async def run() -> None:
        for items in ((b"a", SOON * 10), (b"a", *([0.0, b"b"] * 10**6))):
            client, source = Client(), Source(*items)
            asyncio.get_running_loop().call_later(0.05, client.gone.set)
            began = time.monotonic()
            await streamed(source, client)
            assert time.monotonic() - began < SOON / 2
            assert not client.over

    asyncio.run(run())


@pytest.mark.parametrize("ping_seconds", [0.0, 0.05, 15.0])
def test_a_client_that_takes_nothing_ends_the_source(monkeypatch: pytest.MonkeyPatch, ping_seconds: float) -> None:
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.2)

    async def run() -> None:
        for items in ((b"a", b"b", SOON * 10), (b"a", SOON * 10)):  # an event that is not taken, or a ping
            if items[1] != b"b" and not 0 < ping_seconds < 1:
                continue
            client = Client(room=1)
            await streamed(Source(*items), client, ping_seconds=ping_seconds)
            assert client.taken == [b"a"]

    asyncio.run(run())


def test_what_goes_wrong_in_the_source_is_raised() -> None:
    async def run() -> None:
        with pytest.raises(KeyError):
            await streamed(Source(b"a", KeyError("x")), Client())

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["", " word", '"\\\n\t\x00\x7f', "é😀\u2028", "</script>", "{}", "%s %b", pytest.param(sse.HOLE, id="hole")]
)
def test_templates_make_the_events_that_they_stand_for(text: str) -> None:
    def make(said: str) -> bytes:
        return event({"id": "x", "n": 1.5, "choices": [{"text": said, "logprobs": None}], "model": "a%sb"}, "name")

    made = TextFrame(make)(text)
    assert made == make(text)
    assert json.loads(made.split(b"data: ")[1])["choices"][0]["text"] == text


async def ticking(log: list[str]) -> AsyncIterator[int]:
    try:
        for number in range(10**6):
            await asyncio.sleep(0)
            yield number
        await asyncio.sleep(SOON * 10)
    except asyncio.CancelledError:
        log.append("cancelled")
        raise
    finally:
        log.append("closed")


def test_a_call_that_is_stopped_ends_with_the_reason_wherever_it_is() -> None:
    async def run() -> None:
        for wait in (0.0, 0.001, 0.003, 0.01):
            log: list[str] = []
            running = Running("model", "call")
            events = until_stopped(ticking(log), running)  # type: ignore[arg-type]
            await anext(events)
            asyncio.get_running_loop().call_later(wait, running.stop, "enough")
            with pytest.raises(WorkerError, match="enough") as caught:
                async with asyncio.timeout(SOON):
                    async for _ in events:
                        pass
            assert caught.value.kind == "Stopped"
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling(), "nobody has cancelled the one who reads"
            await asyncio.sleep(0)
            running.stop("again")
            later = until_stopped(ticking([]), running)  # type: ignore[arg-type]
            with pytest.raises(WorkerError, match="enough"):
                await anext(later)

    asyncio.run(run())


def test_a_stop_and_a_cancel_at_once_is_a_cancel() -> None:
    async def run() -> None:
        async def forever() -> AsyncIterator[int]:
            await asyncio.sleep(SOON * 10)
            yield 1

        async def read() -> None:
            async for _ in until_stopped(forever(), running):  # type: ignore[arg-type]
                pass

        running = Running("model", "call")
        reading = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        running.stop("enough")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(run())


def test_a_timeout_of_the_events_is_theirs() -> None:
    async def run() -> None:
        async def late() -> AsyncIterator[int]:
            yield 1
            raise TimeoutError("theirs")

        events = until_stopped(late(), Running("model", "call"))  # type: ignore[arg-type]
        assert await anext(events) == 1
        with pytest.raises(TimeoutError, match="theirs"):
            await anext(events)

    asyncio.run(run())
