"""What a worker says on its way to the server: written by those who say it, no thread has to wake up for a token. No torch.

A thread that has to be woken for each step of a small model costs more than the step: it and the engine's hand Python's lock to
each other all the time.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from herd.server.protocol import UP

__all__ = ["Outbox"]


class Outbox:
    """Messages from any thread to `connection`, in order. `start` it once.

    Whoever flushes writes what there is, also what others put there meanwhile, and waits for nobody: what the other side does not
    take at once is left to a thread, with all that is put until it has written that. `too_large` says what goes out instead of a
    message that no frame holds, `failed` hears of what keeps anything from being written, and does not return.
    """

    def __init__(
        self,
        connection: socket.socket,
        too_large: Callable[[Any, int], Any],
        failed: Callable[[BaseException], Any],
    ) -> None:
        self._connection, self._too_large, self._failed = connection, too_large, failed
        self._messages: list[Any] = []
        self._writing = False
        """Whether somebody writes: he takes what others put, too."""
        self._lock = threading.Lock()
        self._left: queue.SimpleQueue[Iterable[bytes | memoryview]] = queue.SimpleQueue()

    def start(self) -> None:
        """Begin the thread for what has to wait."""
        threading.Thread(target=self._patient, name="herd-write", daemon=True).start()

    def put(self, message: Any) -> None:
        """Keep a message for whoever flushes next."""
        with self._lock:
            self._messages.append(message)

    def flush(self) -> None:
        """Write all messages, unless somebody is writing already."""
        with self._lock:
            if self._writing or not self._messages:
                return
            self._writing = True
        self._write()

    def _write(self) -> None:
        try:
            while messages := self._next():
                frames = UP.frames(messages, self._too_large)
                for data in frames:
                    sent = self._sent(data)
                    if sent < len(data):
                        self._left.put(chain([memoryview(data)[sent:]], frames))
                        return  # the thread is the one that writes now
        except BaseException as error:
            self._failed(error)

    def _next(self) -> list[Any]:
        with self._lock:
            messages, self._messages = self._messages, []
            self._writing = bool(messages)
            return messages

    def _sent(self, data: bytes) -> int:
        """How many bytes of `data` could be written without waiting."""
        try:
            return self._connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def _patient(self) -> None:
        while True:
            try:
                for data in self._left.get():
                    self._connection.sendall(data)
            except BaseException as error:
                self._failed(error)
            self._write()
