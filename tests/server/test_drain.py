"""A server that ends: what it has taken on is done whole, also when that takes several calls; nothing else is begun."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from herd.server.protocol import Began, Ended, Finished, Piece, TokenInfo, Usage
from herd.server.settings import ModelSpec, ServerSettings
from tests.server.conftest import faked, serving
from tests.server.fakes import Scripted, saying

PATIENCE = 60.0
"""Seconds for what comes at once on a machine that does nothing else."""
TEXTS = ["x" * 10_000] * 3
"""Each is a question of its own."""
VECTOR = base64.b64encode(array("f", [1.0, 0.0]).tobytes()).decode()


class Asked(Scripted):
    """Embeds and judges, after `go`. `asked` are the questions and calls."""

    def __init__(self, spec: ModelSpec, go: threading.Event) -> None:
        super().__init__(spec, self._reply)
        self.go, self.asked = go, 0

    def _reply(self, call: Any) -> list[Any]:
        self.asked += 1
        safe = TokenInfo(5, "safe", b"", -0.1, ((5, "safe", b"", -0.1),))
        end = Finished("", Usage(3, 1, 0, 0.01, 0.02))
        return [Began("", 3), 0.05, Piece("", 0, "safe", tokens=(safe,)), Ended("", 0, "stop", None, 1), end]

    async def ask(self, what: str, **args: Any) -> Any:
        if what == "guard":
            return {"categories": {"S1": "Violence"}, "safe": 5, "unsafe": 6}
        self.asked += 1
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        return {"vectors": [VECTOR] * len(args["prompts"]), "tokens": [1] * len(args["prompts"])}


BODIES = {
    "/v1/embeddings": {"model": "fake", "input": TEXTS},
    "/api/embed": {"model": "fake", "input": TEXTS},
    "/v1/moderations": {"input": ["x"] * 20},
}


@pytest.mark.parametrize("path", BODIES)
def test_requests_of_several_parts_are_done_whole(path: str) -> None:
    go, made = threading.Event(), []

    def launch(spec: ModelSpec) -> Asked:
        made.append(Asked(spec, go))
        return made[-1]

    settings = ServerSettings(
        models=(ModelSpec(source="fake", name="fake"),), lazy=True, port=0, guard="fake", drain_seconds=PATIENCE
    )
    for live in serving(settings, launch=launch):  # type: ignore[arg-type]
        with ThreadPoolExecutor(1) as pool, live.client() as client:
            asking = pool.submit(client.post, path, json=BODIES[path])
            while not made or not made[0].asked:
                time.sleep(0.01)
            live.loop.call_soon_threadsafe(live.state.__setattr__, "draining", True)
            refused = httpx.post(f"{live.url}{path}", json=BODIES[path])
            assert refused.status_code == 503
            assert "shutting down" in refused.text
            go.set()
            answer = asking.result(PATIENCE)
        assert answer.status_code == 200, answer.text
        assert made[0].asked == (20 if path == "/v1/moderations" else 3)


def test_the_server_waits_for_what_it_has_taken_on() -> None:
    """Between two parts nothing runs, and the request is not over: `Server.drain` waits for it."""
    go = threading.Event()
    settings = ServerSettings(
        models=(ModelSpec(source="fake", name="fake"),), lazy=True, port=0, drain_seconds=PATIENCE
    )
    made: list[Asked] = []

    def launch(spec: ModelSpec) -> Asked:
        made.append(Asked(spec, go))
        return made[-1]

    for live in serving(settings, launch=launch):  # type: ignore[arg-type]
        pool = ThreadPoolExecutor(1)
        asking = pool.submit(httpx.post, f"{live.url}/v1/embeddings", json=BODIES["/v1/embeddings"], timeout=PATIENCE)
        while not made or not made[0].asked:
            time.sleep(0.01)
        assert (live.state.visits, len(live.state.running)) == (1, 0)
        threading.Timer(0.4, go.set).start()  # the server is told to end before
    assert asking.result(PATIENCE).status_code == 200
    pool.shutdown()
    assert (live.state.visits, made[0].asked) == (0, 3)


def test_when_the_time_is_over_questions_end_with_an_error() -> None:
    async def run() -> None:
        made: list[Asked] = []
        async with faked() as fake:
            fake.state.models._launch = lambda spec: made.append(Asked(spec, threading.Event())) or made[-1]  # type: ignore[func-returns-value]
            asking = asyncio.create_task(fake.client.post("/v1/embeddings", json=BODIES["/v1/embeddings"]))
            while not made or not made[0].asked:
                await asyncio.sleep(0.01)
            fake.state.stop_all("the server is shutting down")
            answer = await asking
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unloaded")
            assert made[0].asked == 1, "and no other part begins"

    asyncio.run(run())


def test_calls_of_a_batch_are_not_begun_any_more() -> None:
    """They are nobody's request: the next server goes on with them."""

    async def run() -> None:
        async with faked(lambda call: saying("x")) as fake:
            fake.state.draining = True
            with pytest.raises(Exception, match="shutting down"):
                await fake.state.ask("fake", "embed")

    asyncio.run(run())
