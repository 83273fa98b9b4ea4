"""Connections at the door: one in a turn, a crowd no faster than it may, and nobody who holds up those behind."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from herd.server import door
from herd.server.door import Door
from tests.server.test_deadlines import certificate

__all__ = ["certificate"]  # a fixture
CROWD = 150


class Guest(asyncio.Protocol):
    """Says hello, and notes in which turn of the loop it came."""

    def __init__(self, came: list[float]) -> None:
        self.came = came

    def connection_made(self, transport: Any) -> None:
        self.came.append(asyncio.get_running_loop().time())
        transport.write(b"hello")


@asynccontextmanager
async def opened(came: list[float], tls: ssl.SSLContext | None = None, **how: Any) -> AsyncIterator[tuple[Door, int]]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        made = Door(listening, lambda: Guest(came), tls, **how)
        made.open()
        try:
            yield made, listening.getsockname()[1]
        finally:
            made.close()
            await made.wait_closed()
            await asyncio.sleep(0.01)


def crowd(port: int, count: int) -> list[socket.socket]:
    """So many clients, who are all in the kernel's queue when this returns."""
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


def test_a_crowd_is_let_in_one_by_one() -> None:
    """In no turn of the loop more than one, and beyond the burst no faster than the rate."""

    async def run() -> None:
        came: list[float] = []
        async with opened(came, burst=20, rate=400.0) as (_, port):
            clients = crowd(port, CROWD)
            seen = most = 0
            while len(came) < CROWD:
                await asyncio.sleep(0)
                most, seen = max(most, len(came) - seen), len(came)
            assert most == 1
            assert came[-1] - came[20] > 0.9 * (CROWD - 21) / 400.0, "those beyond the burst have to wait"
            for client in clients:
                client.close()
            await asyncio.sleep(0.05)
            late = crowd(port, 1)  # the crowd has used up what may come at once; it grows again
            await until(lambda: len(came) == CROWD + 1)
            late[0].close()

    asyncio.run(run())


async def until(true: Any) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.005)


def test_few_do_not_wait() -> None:
    async def run() -> None:
        came: list[float] = []
        async with opened(came, burst=20, rate=0.001) as (_, port):
            clients = crowd(port, 19)
            await until(lambda: len(came) == 19)
            for client in clients:
                assert client.recv(5) == b"hello"
                client.close()

    asyncio.run(run())


def test_who_comes_after_it_is_shut_is_not_let_in() -> None:
    async def run() -> None:
        came: list[float] = []
        async with opened(came) as (made, port):
            made.close()
            made.close()  # twice is fine
            clients = crowd(port, 3)
            await asyncio.sleep(0.05)
            assert came == []
            made.open()
            await until(lambda: len(came) == 3)
            for client in clients:
                client.close()

    asyncio.run(run())


def test_without_file_descriptors_it_waits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It says so once a pause, turns no circles meanwhile, and goes on."""
    monkeypatch.setattr(door, "FULL_SECONDS", 0.05)

    async def run() -> None:
        came: list[float] = []
        async with opened(came) as (made, port):
            real, failed = made._listening, 0

            class Full:
                fileno = real.fileno

                def accept(self) -> Any:
                    nonlocal failed
                    failed += 1
                    if failed < 4:
                        raise OSError(errno.EMFILE, "Too many open files")
                    return real.accept()

            made._listening = Full()  # type: ignore[assignment]
            clients = crowd(port, 2)
            with caplog.at_level(logging.ERROR, "herd.server"):
                await until(lambda: len(came) == 2)
            assert failed in (5, 6)
            assert caplog.text.count("no connection can be taken now: Too many open files") == 3
            made._listening = real
            for client in clients:
                client.close()

    asyncio.run(run())


def test_a_handshake_that_does_not_come_holds_up_nobody(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate

    async def run() -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(cert, key)
        ours = ssl.create_default_context(cafile=str(cert))
        came: list[float] = []
        async with opened(came, tls) as (_, port):
            silent = crowd(port, 5)
            noisy = crowd(port, 2)
            for one in noisy:
                one.sendall(b"GET / HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(30):
                reader, writer = await asyncio.open_connection("localhost", port, ssl=ours, family=socket.AF_INET)
                assert await reader.readexactly(5) == b"hello"
            assert len(came) == 1
            writer.close()
            for one in (*silent, *noisy):
                one.close()

    asyncio.run(run())
