"""One live server on loopback for all tests of a session, and applications over models that say what they are told to."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import openai
import pytest

from herd.server.app import create_app
from herd.server.models import Launch
from herd.server.serve import Server, bound, url_of
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings
from herd.server.state import State
from tests.cli.tiny import write_folder
from tests.server.fakes import Script, Scripted, saying
from tests.server.forked import Forked

LOADING_SECONDS = 120.0
"""A busy machine takes a while."""


@pytest.fixture(scope="session", autouse=True)
def authorities_read_once() -> Iterator[None]:
    """Clients read the certificates of all authorities when they are made, which takes longer than most of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@dataclass(frozen=True)
class Live:
    """A server that runs in a thread: where it is, and its state (look, but do not await in another loop)."""

    url: str
    state: State
    loop: asyncio.AbstractEventLoop

    def clock(self) -> Callable[[], float]:
        """Seconds of a core that the event loop has used: what it makes others wait for, whatever else the machine does."""

        async def clock() -> int:
            return time.pthread_getcpuclockid(threading.get_ident())

        number = asyncio.run_coroutine_threadsafe(clock(), self.loop).result(LOADING_SECONDS)
        return lambda: time.clock_gettime(number)

    def client(self, **more: Any) -> httpx.Client:
        """An HTTP client of it."""
        return httpx.Client(base_url=self.url, timeout=60, **more)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """herd serve with three models, loaded when they are first asked for.

    "nano" (also "herd-nano") is herd-nano. "json" and "python" are random weights with a context of 4,096 bytes, whose prompt
    formats have tools, called in JSON and in Python: what they say is held by grammars, or nonsense.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_folder(folder, context=4096)
    models = (
        ModelSpec(source="nano", name="nano", aliases=("herd-nano",), options=EngineOptions(max_seqs=8, seed=0)),
        ModelSpec(source=str(folder), name="json", options=EngineOptions(format="llama3.1", max_seqs=4, seed=0)),
        ModelSpec(source=str(folder), name="python", options=EngineOptions(format="llama3.2", max_seqs=4, seed=0)),
    )
    yield from serving(ServerSettings(models=models, port=0, lazy=True, drain_seconds=1, ping_seconds=0.5))


def serving(settings: ServerSettings, *, launch: Launch = Forked) -> Iterator[Live]:
    """A live server with these settings."""
    listening = bound(settings)
    server = Server(settings, create_app(settings, launch=launch))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listening])), daemon=True)
    server.capture_signals = _no_signals  # type: ignore[method-assign]  # this is not the main thread
    thread.start()
    try:
        until = time.monotonic() + LOADING_SECONDS
        while not server.started:
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.01)
        yield Live(url_of(listening, settings), server._state, loop)
    finally:
        loop.call_soon_threadsafe(server.drain)
        thread.join(LOADING_SECONDS)
        listening.close()
        assert not thread.is_alive(), "the server does not end"
        loop.close()


def _no_signals() -> Any:
    import contextlib

    return contextlib.nullcontext()


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    """A client of the live server, with both models loaded."""
    with live.client() as client:
        yield client


@dataclass
class Fake:
    """An application over scripted models, and a client of it without sockets."""

    client: httpx.AsyncClient
    state: State
    made: list[Scripted]

    @property
    def model(self) -> Scripted:
        """The model that was made last."""
        return self.made[-1]


@asynccontextmanager
async def faked(
    script: Callable[..., Script] = lambda call: saying("Hello", " there"), **settings: Any
) -> AsyncIterator[Fake]:
    """An application with one model "fake" whose replies are `script(call)`."""
    made: list[Scripted] = []

    def launch(spec: ModelSpec) -> Scripted:
        made.append(Scripted(spec, script))
        return made[-1]

    chosen = {"models": (ModelSpec(source="fake", name="fake", adapters=(("a", "path"),)),), "lazy": True} | settings
    app = create_app(ServerSettings(**chosen), launch=launch)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield Fake(client, app.state.herd, made)


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of nano that keeps files and batches."""
    models = (ModelSpec(source="nano", name="nano", options=EngineOptions(max_seqs=4, seed=0)),)
    folder = str(tmp_path_factory.mktemp("state"))
    yield from serving(ServerSettings(models=models, port=0, lazy=True, drain_seconds=1, state_dir=folder))


@pytest.fixture
def keeping_client(keeping: Live) -> Iterator[openai.OpenAI]:
    """OpenAI's client of that server."""
    with openai.OpenAI(base_url=f"{keeping.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
