"""Taking connections: one in a turn of the event loop, and a crowd no faster than those who are here can bear. No torch.

asyncio takes everybody who waits, up to its backlog, before it does anything else: 400 who came together held all others for a
quarter of a second. Who waits here waits in the kernel, which costs nobody anything.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

__all__ = ["BURST", "RATE", "Door"]

log = logging.getLogger("herd.server")
BURST = 64
"""Connections that are taken as fast as the event loop turns: so many clients start at once, and mean well."""
RATE = 250.0
"""Connections a second when more than those have come. A connection and the beginning of a request on it cost about a
millisecond, so that a crowd has a quarter of the event loop's time."""
FULL_SECONDS = 1.0
"""How long nobody is taken when there are no file descriptors left."""


class Door:
    """Makes a protocol of `factory` for every connection to the listening socket, from `open` to `close`.

    It stands where uvicorn has an asyncio server.
    """

    def __init__(
        self,
        listening: socket.socket,
        factory: Callable[[], asyncio.BaseProtocol],
        tls: ssl.SSLContext | None = None,
        *,
        burst: int = BURST,
        rate: float = RATE,
    ) -> None:
        self._listening, self._factory, self._tls = listening, factory, tls
        self._burst, self._rate = burst, rate
        self._loop = asyncio.get_running_loop()
        self._may, self._counted = float(burst), self._loop.time()
        """How many may be taken at once, and when that was so."""
        self._timer: asyncio.TimerHandle | None = None
        self._coming: set[asyncio.Task[None]] = set()
        listening.setblocking(False)

    def open(self) -> None:
        """Begin."""
        self._loop.add_reader(self._listening.fileno(), self._take)

    def close(self) -> None:
        """Take nobody more. Connections that there are stay."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._listening.fileno() >= 0:
            self._loop.remove_reader(self._listening.fileno())

    async def wait_closed(self) -> None:
        """End what has not become a connection: handshakes."""
        for task in list(self._coming):
            task.cancel()
        await asyncio.gather(*self._coming, return_exceptions=True)

    def _take(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("no connection can be taken now: %s", error.strerror or error)
            self._pause(FULL_SECONDS)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._met(connection))
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)
        now = self._loop.time()
        self._may = min(self._burst, self._may + (now - self._counted) * self._rate) - 1
        self._counted = now
        if self._may < 1:
            self._pause((1 - self._may) / self._rate)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listening.fileno())
        self._timer = self._loop.call_later(seconds, self.open)

    async def _met(self, connection: socket.socket) -> None:
        """Hand it to a protocol, behind its handshake if there is one."""
        try:
            await self._loop.connect_accepted_socket(self._factory, connection, ssl=self._tls)
        except (OSError, TimeoutError):  # it went away, or does not speak TLS
            connection.close()
