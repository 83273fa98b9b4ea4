"""Addresses that requests name: where they may not lead, however they are written, resolved or moved; what may come."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from herd.server.errors import ApiError
from herd.server.fetching import Fetcher, is_public, resolved
from tests.server.test_deadlines import certificate

__all__ = ["certificate"]  # a fixture

PUBLIC = "93.184.216.34"
MOST = 10_000


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
        "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.9",
        "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16", "::1", "::", "fe80::1", "fe80::1%eth0",
        "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:a00:1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:7f00:1::1",
        "2001:db8::1",
        "", "localhost", "127.1", "0x7f.1", "2130706433",
    ],
)  # fmt: skip
def test_addresses_that_are_not(address: str) -> None:
    assert not is_public(address)


Answer = Callable[[str, dict[str, str]], bytes | Awaitable[bytes]]


@asynccontextmanager
async def web(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[int, list[str]]]:
    """A server on loopback: `answer(path, headers)` is all bytes of an answer. Its port, and the hosts and paths asked for."""
    asked: list[str] = []

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:] if line)}
            path = lines[0].split()[1]
            asked.append(f"{headers['host']}{path}")
            assert not {"cookie", "authorization"} & headers.keys()
            said = answer(path, headers)
            writer.write(said if isinstance(said, bytes) else await said)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(met, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1], asked
        await asyncio.sleep(0.05)  # connections that are being closed need a turn for it


def http(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    told = {
        "content-type": "image/png",
        "content-length": str(len(body)),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in told.items() if value), "", ""]
    return "\r\n".join(lines).encode() + body


def fetcher(port: int, names: dict[str, list[str]], **more: Any) -> Fetcher:
    """One that takes loopback for public, and asks nobody for names."""

    async def resolve(host: str, _: int) -> list[str]:
        if host not in names:
            raise socket.gaierror(host)
        return names[host]

    allowed = lambda address: address == "127.0.0.1" or is_public(address)  # noqa: E731
    return Fetcher(**{"allowed": allowed, "resolve": resolve, "ports": (port, 443), "seconds": 20.0, **more})


def refused(work: Awaitable[bytes], words: str) -> Awaitable[None]:
    async def run() -> None:
        with pytest.raises(ApiError, match=words) as told:
            await work
        assert told.value.status == 400
        assert "127.0.0.1" not in str(told.value), "nothing is told of what is inside"

    return run()


HERE = {"pictures.test": ["127.0.0.1"]}


def test_a_picture_comes_as_it_is() -> None:
    async def run() -> None:
        async with web(lambda path, headers: http(path.encode())) as (port, asked):
            sizes: list[int] = []
            url = f"http://pictures.test:{port}/a.png?b=c#d"
            assert await fetcher(port, HERE).fetch(url, MOST, sizes.append) == b"/a.png?b=c"
            assert asked == [f"pictures.test:{port}/a.png?b=c"]
            assert sum(sizes) == len(b"/a.png?b=c")

    asyncio.run(run())


@pytest.mark.parametrize(
    "url",
    [
        "ftp://pictures.test/a", "file:///etc/passwd", "gopher://pictures.test/", "//pictures.test/", "pictures.test", "",
        "http://me:word@pictures.test/", "http://me@pictures.test/", "http://pictures.test:22/", "http://pictures.test:6379/",
        "http://pictures.test:99999/", "http://pictures.test:-1/", "http:///a", "http://[::1%25eth0]/", "http://pictures.test\\@evil/",
        "http://pictures.test/\r\nX: y", "http://pictures.test/ b", "http://pictures.test\t/", "http://\u2460.test/", "https://[::1/",
        "http://pictures.test/" + "a" * 3000, "javascript:alert(1)", "HTTP:pictures.test",
    ],
)  # fmt: skip
def test_addresses_that_are_not_opened(url: str) -> None:
    asked: list[str] = []

    async def resolve(host: str, _: int) -> list[str]:
        asked.append(host)
        return [PUBLIC]

    asyncio.run(refused(Fetcher(resolve=resolve).fetch(url, MOST), "address that is not opened"))  # type: ignore[arg-type]
    assert asked == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]",
     "[::ffff:7f00:1]",
     "169.254.169.254", "[fe80::1]", "[64:ff9b::7f00:1]", "localhost.", "LOCALHOST"],
)  # fmt: skip
def test_this_machine_in_every_spelling(host: str) -> None:
    """With the real resolver and the real rule, beside a server that would answer."""

    async def run() -> None:
        async with web(lambda path, headers: http(b"secret")) as (port, asked):
            await refused(
                Fetcher(ports=(port,), seconds=20.0).fetch(f"http://{host}:{port}/", MOST),
                "nothing at a public address|not opened",
            )
            assert asked == []

    asyncio.run(run())


def test_names_that_lead_inside() -> None:
    """One address of several is enough; it makes no difference whether anybody listens there."""

    async def run() -> None:
        async with web(lambda path, headers: http(b"secret")) as (port, asked):
            names = {
                "mixed.test": [PUBLIC, "10.0.0.5"],
                "inside.test": ["169.254.169.254"],
                "none.test": [],
                "shut.test": ["127.0.0.1"],
            }
            for host in (*names, "unknown.test"):
                at = 1 if host == "shut.test" else port
                one = fetcher(port, names, ports=(port, 1))
                await refused(
                    one.fetch(f"http://{host}:{at}/", MOST),
                    "^cannot be fetched: nothing at a public address answers there$",
                )
            assert asked == []

    asyncio.run(run())


def test_a_name_that_means_something_else_a_moment_later() -> None:
    """It is resolved once for a hop, and the connection goes where that was."""

    async def run() -> None:
        answers = [["127.0.0.1"], ["169.254.169.254"]]

        async def resolve(host: str, _: int) -> list[str]:
            return answers.pop(0)

        async with web(lambda path, headers: http(b"fine")) as (port, asked):
            one = fetcher(port, {}, resolve=resolve)
            assert await one.fetch(f"http://rebound.test:{port}/", MOST) == b"fine"
            assert len(answers) == 1, "asked for once"
            await refused(one.fetch(f"http://rebound.test:{port}/", MOST), "public")
            assert len(asked) == 1

    asyncio.run(run())


def test_every_hop_is_looked_at() -> None:
    """Redirects to other names, inside, to files, to other ports, in circles; a few good ones are followed."""

    async def run() -> None:
        here = [0]

        def answer(path: str, headers: dict[str, str]) -> bytes:
            port = here[0]
            to = {
                "/ok": f"http://other.test:{port}/there", "/relative": "/there", "/inside": f"http://inside.test:{port}/",
                "/metadata": f"http://169.254.169.254:{port}/latest/meta-data/", "/file": "file:///etc/passwd",
                "/port": "http://pictures.test:22/", "/circle": "/circle", "/password": f"http://a:b@pictures.test:{port}/",
                "/local": f"http://localhost:{port}/there",
                "/bad": "http://[",
            }.get(path)  # fmt: skip
            return http(b"there") if to is None else http(b"", "302 Found", location=to)

        async with web(answer) as (port, asked):
            here[0] = port
            inside = {"inside.test": ["10.0.0.1"], "169.254.169.254": ["169.254.169.254"], "localhost": ["::1"]}
            one = fetcher(port, HERE | inside | {"other.test": ["127.0.0.1"]})
            for path in ("/ok", "/relative"):
                assert await one.fetch(f"http://pictures.test:{port}{path}", MOST) == b"there"
            assert asked[1] == f"other.test:{port}/there"
            before = len(asked)
            for path, words in {
                "/inside": "public", "/metadata": "public", "/file": "not opened", "/port": "not opened",
                "/password": "not opened",
                "/local": "public", "/bad": "no address|not opened",
            }.items():  # fmt: skip
                await refused(one.fetch(f"http://pictures.test:{port}{path}", MOST), words)
            assert len(asked) == before + 7, "the first hop of each, and nothing behind it"
            await refused(one.fetch(f"http://pictures.test:{port}/circle", MOST), "more than 3 times")
            assert len(asked) == before + 7 + 4

    asyncio.run(run())


def test_what_is_no_picture_is_refused() -> None:
    async def endless() -> bytes:
        await asyncio.sleep(30)
        return b""

    piece = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    answers: dict[str, tuple[Answer, str]] = {
        "html": (lambda path, headers: http(b"<p>", content_type="text/html"), "of type 'text/html'"),
        "none": (lambda path, headers: http(b"x", content_type=""), "of type ''"),
        "404": (lambda path, headers: http(b"", "404 Not Found"), "the answer is 404"),
        "said": (lambda path, headers: http(b"", content_length="999999999"), "larger than 10,000 bytes"),
        "chunks": (
            lambda path, headers: http(content_length="", transfer_encoding="chunked") + piece * 3 + b"0\r\n\r\n",
            "larger than 10,000 bytes",
        ),
        "zip": (lambda path, headers: http(b"x", content_encoding="gzip"), "compressed"),
        "cut": (lambda path, headers: http(b"abc", content_length="9000"), "public"),
        "noise": (lambda path, headers: b"\x00\x01\x02\r\n\r\n", "public"),
        "slow": (lambda path, headers: endless(), "did not come within"),
    }  # fmt: skip

    async def run() -> None:
        for answer, words in answers.values():
            async with web(answer) as (port, _):
                await refused(fetcher(port, HERE, seconds=0.5).fetch(f"http://pictures.test:{port}/", MOST), words)

    asyncio.run(run())


def test_tls_is_of_the_name_and_not_of_the_address(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate

    async def run() -> None:
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        theirs.load_cert_chain(cert, key)
        ours = ssl.create_default_context(cafile=str(cert))
        names = {"localhost": ["127.0.0.1"], "other.test": ["127.0.0.1"]}
        async with web(lambda path, headers: http(b"fine"), theirs) as (port, asked):
            one = fetcher(port, names, tls=ours)
            assert await one.fetch(f"https://localhost:{port}/", MOST) == b"fine"
            await refused(one.fetch(f"https://other.test:{port}/", MOST), "public")  # a certificate of another name
            # Nobody has signed it.
            await refused(fetcher(port, names).fetch(f"https://localhost:{port}/", MOST), "public")
            assert len(asked) == 1
        async with web(lambda path, headers: http(b"", "302 Found", location="http://localhost/"), theirs) as (port, _):
            await refused(
                fetcher(port, names, tls=ours).fetch(f"https://localhost:{port}/", MOST),
                "from https to an address without",
            )

    asyncio.run(run())


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with web(lambda path, headers: http(b"fine")) as (port, _):
            for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
                monkeypatch.setenv(name, "http://127.0.0.1:9")
            assert await fetcher(port, HERE).fetch(f"http://pictures.test:{port}/", MOST) == b"fine"

    asyncio.run(run())


def test_the_resolver_gives_addresses() -> None:
    assert "127.0.0.1" in asyncio.run(resolved("localhost", 80)) or "::1" in asyncio.run(resolved("localhost", 80))
    with pytest.raises(OSError):
        asyncio.run(resolved("name.invalid", 80))
