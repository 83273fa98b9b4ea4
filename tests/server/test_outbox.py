"""What a worker says reaches the server whole and in order, and nobody in the worker waits for the server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from herd.server.outbox import Outbox
from herd.server.protocol import UP, Piece
from herd.server.wire import HEADER, split_header

SOON = 20.0
"""Seconds for what takes milliseconds, on a machine that others use, too."""
SMALL = 4096
"""Bytes that the system keeps of what nobody has read."""


class Far:
    """The other end: what it has read, frame by frame."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")

    def frame(self) -> list[Any]:
        return UP.decode(self._file.read(split_header(self._file.read(HEADER))))

    def messages(self, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            found += self.frame()
        return found


@contextmanager
def outbox() -> Iterator[tuple[Outbox, Far, list[BaseException]]]:
    ours, theirs = socket.socketpair()
    failures: list[BaseException] = []
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        ours.settimeout(SOON)
        made = Outbox(theirs, lambda message, size: pytest.fail("nothing is too large here"), failures.append)
        yield made, Far(ours), failures


def test_what_a_step_says_goes_out_in_one_frame() -> None:
    with outbox() as (out, far, _):
        told = [Piece(str(number), text="x") for number in range(8)]
        for piece in told:
            out.put(piece)
        out.flush()
        assert far.frame() == told


def test_whoever_flushes_does_not_wait_for_a_reader() -> None:
    """Without a thread that writes on, too: the engine goes on stepping when the server is busy."""
    told = [Piece("1", text=f"{number} " + "x" * 500) for number in range(400)]
    with outbox() as (out, far, failures):
        for piece in told:
            out.put(piece)
            out.flush()  # far more than the system keeps: with a write that waits, this would never return
        out.start()
        assert far.messages(len(told)) == told
        assert not failures


def test_messages_of_many_threads_keep_their_order() -> None:
    threads, each = 8, 300
    with outbox() as (out, far, failures):
        out.start()

        def speak(name: str) -> None:
            for number in range(each):
                out.put(Piece(name, number, "y" * (number % 70)))
                if number % 3 or number == each - 1:
                    out.flush()

        speakers = [threading.Thread(target=speak, args=(str(name),)) for name in range(threads)]
        for one in speakers:
            one.start()
        found = far.messages(threads * each)
        for one in speakers:
            one.join(SOON)
        for name in range(threads):
            assert [piece.index for piece in found if piece.call == str(name)] == list(range(each))
        assert not failures


def test_a_server_that_is_gone_is_noticed() -> None:
    for waiting in (False, True):
        ours, theirs = socket.socketpair()
        failed = threading.Event()
        failures: list[BaseException] = []

        def hear(error: BaseException, failures: list[BaseException] = failures, failed: Any = failed) -> None:
            failures.append(error)
            failed.set()
            if threading.current_thread().name == "herd-write":
                threading.Event().wait()  # it does not return: a worker ends here
            raise SystemExit

        with theirs:
            out = Outbox(theirs, lambda message, size: message, hear)
            if waiting:
                out.put(Piece("1", text="x" * 3_000_000))
                out.flush()
                ours.close()
                out.start()
            else:
                ours.close()
                out.put(Piece("1"))
                with pytest.raises(SystemExit):
                    out.flush()
            assert failed.wait(SOON)
            assert isinstance(failures[0], OSError)
