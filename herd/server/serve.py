"""Running the application: the socket, signals, and an end that lets replies finish. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import socket
import ssl
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from herd.errors import ConfigError, HerdError
from herd.server.app import create_app
from herd.server.deadlines import Limits, protocol_with
from herd.server.door import Door
from herd.server.settings import ServerSettings
from herd.server.state import State

__all__ = ["Server", "bound", "serve"]

log = logging.getLogger("herd.server")
BACKLOG = 4096
"""Connections that may wait in the kernel. Linux allows so many unless it was told otherwise."""


def bound(settings: ServerSettings) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sends at once only where the protocol is said.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.host, settings.port))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    return made


def url_of(listening: socket.socket, settings: ServerSettings | None = None) -> str:
    """Where clients reach it."""
    scheme = "https" if settings is not None and settings.ssl_certfile else "http"
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, with an end in three steps: the first signal refuses new requests and lets replies end, for `drain_seconds`; then
    what is left ends with an error; a second signal ends at once."""

    def __init__(self, settings: ServerSettings, app: Any) -> None:
        limits = Limits(settings.head_seconds, settings.body_seconds, settings.send_seconds, settings.max_connections)
        app.state.herd.counts.late = lambda: limits.closed
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(settings.idle_seconds),
            timeout_graceful_shutdown=3,
            lifespan="on",
            loop="asyncio",
            http=protocol_with(limits),
            ws="none",
            h11_max_incomplete_event_size=64 << 10,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        super().__init__(config)
        self.settings = settings
        self.failure: HerdError | None = None
        """Why it ended by itself."""
        self._state: State = app.state.herd
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; connections are taken by a `Door`."""
        await super().startup(sockets=[])

        made: Any = self.config.http_protocol_class

        def protocol() -> asyncio.Protocol:
            return made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        doors = [Door(one, protocol, self.config.ssl) for one in sockets or ()]
        self.servers = doors  # type: ignore[assignment]  # closed and waited for, and nothing else
        for door in doors:
            door.open()
        gc.freeze()  # all that is loaded stays: looking through it would hold everybody up for as long as twenty requests

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().shutdown(sockets)
        gc.unfreeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's, which calls it from a signal handler."""
        if self._state.draining:
            self.should_exit = self.force_exit = True
            return
        self._state.draining = True
        loop = asyncio.get_event_loop()
        loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Refuse new requests, let those on their way end, and then end the server."""
        self._state.draining = True
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drained())

    def end(self, failure: HerdError | None = None) -> None:
        """End the server now, with an error or without."""
        self.failure = self.failure or failure
        self.should_exit = True

    async def _drained(self) -> None:
        until = time.monotonic() + self.settings.drain_seconds
        while (self._state.visits or self._state.running) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self._state.stop_all("the server is shutting down")
        await asyncio.sleep(0.1)  # for the last bytes of what has just ended
        self.should_exit = True


def serve(settings: ServerSettings, *, on_start: Callable[[str, State], None] | None = None) -> None:
    """Run a server until a signal ends it. `on_start(url, state)` hears when it listens.

    Raises ConfigError when it cannot listen, and what kept a model that was named from being loaded.
    """
    _check_tls(settings)
    listening = bound(settings)
    app = create_app(settings)
    server = Server(settings, app)

    async def run() -> None:
        watching = asyncio.create_task(_watch(server, app.state.herd, url_of(listening, settings), on_start))
        try:
            await server.serve(sockets=[listening])
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    try:
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when all has ended well
            asyncio.run(run())
    finally:
        listening.close()
    if server.failure is not None:
        raise server.failure


def _check_tls(settings: ServerSettings) -> None:
    """Raise ConfigError for a certificate that cannot be used."""
    if settings.ssl_certfile is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                settings.ssl_certfile, settings.ssl_keyfile
            )
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"TLS cannot use {settings.ssl_certfile} with {settings.ssl_keyfile}: {error}") from None


async def _watch(server: Server, state: State, url: str, on_start: Callable[[str, State], None] | None) -> None:
    """Say when the server listens, and end it when a model that it was started for cannot be loaded."""
    while not server.started:
        await asyncio.sleep(0.01)
    if on_start is not None:
        on_start(url, state)
    while True:
        await asyncio.sleep(0.1)
        for slot in state.models.slots.values():
            process = slot.process
            named = slot.spec in state.settings.models and not state.settings.lazy
            if named and process is not None and process.about is None and process.error is not None and slot.failed_at:
                server.end(HerdError(f"{slot.spec.name} cannot be loaded: {process.error}"))
                return
        if all(slot.state == "ready" for slot in state.models.slots.values()):
            return
