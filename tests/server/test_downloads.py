"""Downloads that clients ask for: few at once, joined, told as they come, ended when nobody waits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from herd.errors import HerdError, UnknownModelError
from herd.server.downloads import Downloads
from tests.server.conftest import faked

PATIENCE = 60.0
"""Seconds for what comes at once on a machine that does nothing else."""


async def until(true: Callable[[], bool]) -> None:
    """Wait for something."""
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.01)


def test_downloads_are_few_and_leave_the_other_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    go, names = threading.Event(), []

    def pull(name: str, *, watch: Any) -> None:
        names.append(threading.current_thread())
        go.wait(PATIENCE)

    monkeypatch.setattr("herd.server.downloads.pull", pull)

    async def run() -> None:
        async with faked(any_model=True) as fake:
            body = {"stream": False}
            two = [asyncio.create_task(fake.client.post("/api/pull", json=body | {"model": m})) for m in ("a", "b")]
            await until(lambda: len(names) == 2)
            third = await fake.client.post("/api/pull", json=body | {"model": "c"})
            assert third.status_code == 429
            streamed = await fake.client.post("/api/pull", json={"model": "c"})
            assert "2 downloads are running" in json.loads(streamed.text.splitlines()[-1])["error"]
            go.set()
            assert [one.status_code for one in await asyncio.gather(*two)] == [200, 200]
            assert (await fake.client.post("/api/pull", json=body | {"model": "c"})).status_code == 200
        assert all(thread.daemon for thread in names), "the end of the server does not wait for them"

    asyncio.run(run())


def test_a_download_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The download itself is herd.hub's, and tested there; here, what is told of it."""

    def pull(name: str, *, watch: Any) -> None:
        if name != "llama3.2:1b":
            raise UnknownModelError(f"no model is called {name}")
        watch.begin([("a.safetensors", 100)])
        watch.note("there is little room")
        watch.moved("a.safetensors", 40)
        watch.moved("a.safetensors", 100)

    monkeypatch.setattr("herd.server.downloads.pull", pull)

    async def run() -> None:
        async with faked(any_model=True) as fake:
            answer = await fake.client.post("/api/pull", json={"model": "llama3.2:1b"})
            lines = [json.loads(one) for one in answer.text.splitlines()]
            assert lines[0] == {"status": "pulling manifest"}
            assert lines[-1] == {"status": "success"}
            assert [one["completed"] for one in lines if "completed" in one][-1] == 100
            assert {"status": "there is little room"} in lines
            assert [one["total"] for one in lines if "total" in one][-1] == 100
            answer = await fake.client.post("/api/pull", json={"model": "other"})
            assert json.loads(answer.text.splitlines()[-1]) == {"error": "no model is called other"}
            answer = await fake.client.post("/api/pull", json={"model": "other", "stream": False})
            assert (answer.status_code, answer.json()) == (404, {"error": "no model is called other"})

    asyncio.run(run())


class Coming:
    """A download that comes byte by byte until it may end. `ended` is how each did."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.go = threading.Event()
        self.done = 0

    def __call__(self, name: str, *, watch: Any) -> None:
        self.begun.append(name)
        watch.begin([("a.safetensors", 100)])
        try:
            while not self.go.wait(0.01):
                self.done = min(99, self.done + 1)
                watch.moved("a.safetensors", self.done)
            watch.moved("a.safetensors", 100)
        except HerdError:
            self.ended.append("left")
            raise
        self.ended.append("whole")


def test_equal_downloads_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    coming = Coming()
    monkeypatch.setattr("herd.server.downloads.pull", coming)

    async def run() -> None:
        async with faked(any_model=True) as fake:
            asks = [
                asyncio.create_task(fake.client.post("/api/pull", json={"model": "a", "stream": stream}))
                for stream in (True, False, True, False)
            ]
            await until(lambda: any(one.waiting == 4 for one in fake.state.downloads._running.values()))
            coming.go.set()
            for answer in await asyncio.gather(*asks):
                assert answer.status_code == 200
                assert json.loads(answer.text.splitlines()[-1]) == {"status": "success"}
            assert coming.begun == ["a"]
            assert not fake.state.downloads._running
            await fake.client.post("/api/pull", json={"model": "a", "stream": False})
            assert coming.begun == ["a", "a"], "what has ended is no download to be joined"

    asyncio.run(run())


def test_a_download_ends_when_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    coming = Coming()
    monkeypatch.setattr("herd.server.downloads.pull", coming)

    async def run() -> None:
        downloads = Downloads()

        async def wait() -> None:
            with downloads.joined("a") as work:
                async for _ in work.told():
                    pass

        waiting = [asyncio.create_task(wait()) for _ in range(2)]
        await until(lambda: coming.done > 2)
        waiting[0].cancel()
        seen = coming.done
        await until(lambda: coming.done > seen + 2)
        assert not coming.ended, "one still waits"
        waiting[1].cancel()
        await until(lambda: coming.ended == ["left"])
        assert not downloads._running
        await asyncio.gather(*waiting, return_exceptions=True)
        coming.go.set()
        await wait()
        assert coming.ended == ["left", "whole"], "its place is free again"

    asyncio.run(run())


def test_clients_that_go_away_leave_their_download(monkeypatch: pytest.MonkeyPatch) -> None:
    coming = Coming()
    monkeypatch.setattr("herd.server.downloads.pull", coming)

    async def run() -> None:
        async with faked(any_model=True) as fake:
            for number, stream in enumerate((True, False), 1):
                asking = asyncio.create_task(fake.client.post("/api/pull", json={"model": "a", "stream": stream}))
                await until(lambda number=number: len(coming.begun) == number)
                asking.cancel()
                await until(lambda number=number: coming.ended == ["left"] * number)
                await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(run())
