"""The HTTP protocol with deadlines: clients that send or take bytes one by one are not waited for. No torch.

uvicorn's own timer is for idle connections only, and starts again with every byte. Here the head of a request must be complete
`head` seconds after its first byte (or after the connection was made), its body `body` seconds later, with a second more for
each `RATE` bytes that have come; and of an answer something must be taken every `send` seconds. An answer that was given before
the body had come (a refusal) can still be read: what is left of the body is thrown away for `LINGER_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["RATE", "Limits", "protocol_with"]

log = logging.getLogger("herd.server")
RATE = 64 << 10
"""Bytes a second. A body that comes at least so fast is waited for to its end."""
LINGER_SECONDS = 3.0
LINGER_BYTES = 1 << 20


class Limits:
    """How long a connection may take, in seconds, and how many there may be."""

    def __init__(self, head: float, body: float, send: float, connections: int) -> None:
        self.head, self.body, self.send, self.connections = head, body, send, connections
        self.closed = 0
        """Connections that were ended because of one of these."""


class _Patient(H11Protocol):
    """uvicorn's protocol, with deadlines."""

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiving: asyncio.TimerHandle | None = None
        self._waits_for = ""
        """head, body or rest: what `_receiving` is about."""
        self._sending: asyncio.TimerHandle | None = None
        self._left = 0
        self._came = 0
        self._body_until = 0.0
        self._thrown = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._close("there are too many connections")
            return
        self._await("head", self.limits.head)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receiving, self._sending):
            if timer is not None:
                timer.cancel()
        self._receiving = self._sending = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._waits_for == "rest":
            self._thrown += len(data)
            if self._thrown > LINGER_BYTES:
                self._close("a body that was refused goes on")
                return
        self._came += len(data)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def _look(self) -> None:
        """Set the timer for what is expected of the client now."""
        if self.transport.is_closing():
            return
        theirs, answered = self.conn.their_state, self.cycle is None or self.cycle.response_complete
        if theirs is h11.SEND_BODY and not answered:
            if self._waits_for != "body":
                self._came, self._body_until = 0, self.loop.time() + self.limits.body
                self._await("body", self.limits.body)
        elif theirs is h11.SEND_BODY:
            if self._waits_for != "rest":
                self._thrown = 0
                self._unset_keepalive_if_required()
                self._await("rest", LINGER_SECONDS)
        elif theirs is h11.IDLE and self.conn.trailing_data[0]:
            if self._waits_for != "head":
                self._await("head", self.limits.head)
        elif self._receiving is not None and not (theirs is h11.IDLE and self.cycle is None):
            self._receiving.cancel()
            # It came after all: the connection is idle from now on.
            if self._waits_for == "rest" and theirs is h11.IDLE:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            self._receiving, self._waits_for = None, ""

    def _await(self, what: str, seconds: float) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
        self._waits_for = what
        self._receiving = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self._waits_for == "body":
            more = self._body_until + self._came / RATE - self.loop.time()
            if more > 0.01:
                self._await("body", more)
                return
        self._close(f"the {self._waits_for} of a request took too long")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._left = self.transport.get_write_buffer_size()
        self._sending = self.loop.call_later(self.limits.send, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _stalled(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left < self._left:
            self._left = left
            self._sending = self.loop.call_later(self.limits.send, self._stalled)
            return
        self._close("an answer is not taken")

    def _close(self, why: str) -> None:
        """End the connection at once: who is slow on purpose would not take a farewell either."""
        self.limits.closed += 1
        log.info("a connection was closed: %s", why)
        self.transport.abort()


def protocol_with(given: Limits) -> type[H11Protocol]:
    """The protocol class of a server with these limits."""
    return type("Patient", (_Patient,), {"limits": given})
