"""Clients on raw sockets that are slow on purpose, too many, or talk nonsense: each is ended, nobody else notices."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import ssl
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from herd.errors import ConfigError
from herd.server.serve import serve
from herd.server.settings import ModelSpec, ServerSettings
from tests.server.conftest import Live, serving
from tests.server.fakes import Scripted, saying

HEAD, BODY, SEND, IDLE, LINGER = 0.3, 0.4, 0.4, 1.2, 0.5
SLACK = 6.0
"""Seconds by which a timer of a busy machine may be late."""
BIG, HUGE = 3_000_000, 12_000_000
"""Characters of a reply; and of one that a socket's buffers never hold: Linux lets a sender's grow to 4 MiB (tcp_wmem)."""
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def script(call: Any) -> Any:
    text = str(call.prompt)
    if "huge" in text:
        return saying("x" * HUGE)
    if "long" in text:
        return saying("x" * BIG)
    return saying(*["y" * 2000] * 3000) if "stream" in text else saying("Hello")


def patience(slower: float = 1.0) -> ServerSettings:
    """Short deadlines."""
    return ServerSettings(
        models=(ModelSpec(source="fake", name="fake"),), port=0, lazy=True, drain_seconds=0.2, max_body=1 << 20,
        head_seconds=slower * HEAD, body_seconds=slower * BODY, send_seconds=SEND, idle_seconds=IDLE, max_connections=600,
    )  # fmt: skip


made: list[Scripted] = []


def launch(spec: ModelSpec) -> Scripted:
    made.append(Scripted(spec, script))
    return made[-1]


@pytest.fixture(scope="module")
def patient() -> Iterator[Live]:
    """A server with short deadlines over a model that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("herd.server.deadlines.LINGER_SECONDS", LINGER)
        yield from serving(patience(), launch=launch)


def at_once(check: Callable[[Any], None], cases: Sequence[Any]) -> None:
    """Each case in a thread of its own: they wait, and know nothing of each other."""
    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(check, cases))


def connected(live: Live, receive: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    made.settimeout(20)
    host, port = live.url.removeprefix("http://").split(":")
    made.connect((host, int(port)))
    return made


def rest(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    out = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            out += data
    return out


def until_closed(connection: socket.socket, trickle: bytes, every: float = 0.05) -> float:
    """Seconds until the server ends a connection that sends `trickle` byte by byte, over and over."""
    began = time.monotonic()
    connection.settimeout(every)
    position = 0
    while time.monotonic() - began < 20:
        try:
            connection.send(trickle[position % len(trickle) :][:1])
            position += 1
            if connection.recv(1) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


def test_heads_that_do_not_end(patient: Live) -> None:
    def check(beginning: bytes) -> None:
        with connected(patient) as connection:
            connection.sendall(beginning)
            if beginning.endswith(b"\r\n\r\n"):
                time.sleep(0.1)
                assert connection.recv(65536).startswith(b"HTTP/1.1 ")  # an answer; then the next head
            assert until_closed(connection, b"X-A: bcdefgh\r\n") < HEAD + SLACK

    at_once(check, (b"", b"GET /health HT", POST, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    assert patient.state.counts.late() >= 4


def test_a_connection_that_says_nothing(patient: Live) -> None:
    with connected(patient) as connection:
        began = time.monotonic()
        assert rest(connection) == b""
        assert HEAD - 0.1 < time.monotonic() - began < HEAD + SLACK


def test_bodies_that_do_not_end(patient: Live) -> None:
    def check(sent: tuple[bytes, bytes]) -> None:
        head, trickle = sent
        with connected(patient) as connection:
            connection.sendall(head)
            assert BODY - 0.1 < until_closed(connection, trickle) < BODY + SLACK

    length = (POST + b"Content-Length: 100000\r\n\r\n", b" ")
    at_once(check, (length, (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n")))


def test_bodies_that_come_steadily_are_waited_for(patient: Live) -> None:
    """Longer than the deadline, but quicker than its rate."""
    body = json.dumps(CHAT).encode()
    body += b" " * (200_000 - len(body))
    with connected(patient) as connection:
        connection.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode())
        began = time.monotonic()
        for i in range(0, len(body), 20_000):
            connection.sendall(body[i : i + 20_000])
            time.sleep(0.08)
        assert time.monotonic() - began > BODY * 1.5
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_keep_alive_connection_may_pause(patient: Live) -> None:
    with connected(patient) as connection:
        for _ in range(2):
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(HEAD * 1.2)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        assert rest(connection) == b""
        assert time.monotonic() - began < IDLE + SLACK


def test_a_refusal_can_be_read_while_the_body_still_comes(patient: Live) -> None:
    """Also with a length that lies, and in chunks; what follows is thrown away, for a while only."""
    with connected(patient) as connection:
        connection.sendall(POST + b"Content-Length: 100000000\r\n\r\n" + b" " * 300_000)
        assert connection.recv(12) == b"HTTP/1.1 413"
        assert b"request_too_large" in rest(connection)
    with connected(patient) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 100 << 20:
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                sent += 65536
        assert sent < 20 << 20, "the server takes bytes long after it refused them"


def test_a_body_that_comes_after_its_refusal_leaves_no_connection_open_for_ever(patient: Live) -> None:
    """It is thrown away, the connection may be used again, and is as idle as any other."""
    form = POST.replace(b"application/json", b"text/html") + b"Content-Length: 4\r\n\r\n"

    def told(connection: socket.socket, asked: bytes) -> bytes:
        connection.sendall(asked)
        got = b""
        while not got.endswith(b"}"):
            got += connection.recv(65536)
        return got

    with connected(patient) as connection:
        assert told(connection, form).startswith(b"HTTP/1.1 415")
        connection.sendall(b"late")
        assert told(connection, b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert told(connection, form).startswith(b"HTTP/1.1 415")
        connection.sendall(b"late")
        connection.settimeout(IDLE + SLACK)
        assert rest(connection) == b"", "it is closed"


def test_two_requests_in_one_packet(patient: Live) -> None:
    with connected(patient) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        time.sleep(0.3)
        assert connection.recv(65536).count(b"HTTP/1.1 200") == 3


def test_nonsense_is_answered(patient: Live) -> None:
    def check(nonsense: bytes) -> None:
        with connected(patient) as connection:
            connection.sendall(nonsense)
            reply = connection.recv(65536)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            reply += rest(connection)
            assert reply.startswith(b"HTTP/1.1 4") or reply == b"", reply[:100]

    cases = (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 100,
        b"GET / HTTP/x\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    )
    at_once(check, cases)
    assert httpx.get(f"{patient.url}/version").status_code == 200


def test_answers_that_nobody_reads(patient: Live) -> None:
    """A whole reply and a stream of megabytes, and a client that takes no byte: ended, and the model's work with it."""
    for content, stream in (("huge", False), ("stream", True)):
        before = patient.state.counts.late()
        with connected(patient, receive=4096) as connection:
            body = json.dumps({**CHAT, "messages": [{"role": "user", "content": content}], "stream": stream}).encode()
            connection.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until = time.monotonic() + SEND + 2 * SLACK
            while patient.state.counts.late() == before:
                assert time.monotonic() < until, "a client that reads nothing is kept"
                time.sleep(0.02)
            until = time.monotonic() + SLACK
            while made[-1].running:
                assert time.monotonic() < until
                time.sleep(0.02)


def test_slow_readers_are_waited_for(patient: Live) -> None:
    with connected(patient, receive=16384) as connection:
        body = json.dumps({**CHAT, "messages": [{"role": "user", "content": "long"}]}).encode()
        connection.sendall(POST + f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        got, began = b"", time.monotonic()
        while data := connection.recv(1 << 17):
            got += data
            time.sleep(0.03 if time.monotonic() - began < SEND * 2 else 0)
        assert len(got) > BIG


def crowd(live: Live, heads: int, bodies: int, slower: float) -> tuple[list[float], list[float]]:
    """Seconds until each of so many tricklers was ended, heads and bodies, who all come at once; they are fed a byte at a time by
    one thread."""
    connections = [(connected(live), i < heads) for i in range(heads + bodies)]
    for connection, is_head in connections:
        connection.setblocking(False)
        connection.send(b"GET /he" if is_head else POST + b"Content-Length: 100000\r\n\r\n")
    began = time.monotonic()
    ended: tuple[list[float], list[float]] = ([], [])
    left = set(connections)
    while left and time.monotonic() - began < slower * (HEAD + BODY) + 4 * SLACK:
        for number, one in enumerate(list(left)):
            connection, is_head = one
            if number % TOGETHER == 0:  # they know nothing of each other
                time.sleep(TOGETHER * 0.1 / len(connections))
            try:
                connection.send(b"a" if is_head else b" ")
                gone = connection.recv(100) == b""
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                ended[0 if is_head else 1].append(time.monotonic() - began)
                connection.close()
                left.discard(one)
    for connection, _ in left:
        connection.close()
    return ended


def first_bytes(live: Live, count: int) -> list[float]:
    """What the event loop does until the first event of so many honest requests, in seconds of a core."""
    out, clock = [], live.clock()
    with live.client() as client:
        for _ in range(count):
            began = clock()
            with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as stream:
                next(stream.iter_lines())
                out.append(clock() - began)
    return out


def worst(taken: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(taken, n=100, method="inclusive")[98]


def test_what_a_server_is_made_of_is_not_collected_while_it_runs() -> None:
    """Python's collector stops everybody: over all that is loaded it takes as long as twenty requests and more."""
    for _ in serving(patience(), launch=launch):
        assert gc.get_freeze_count() > 10 * len(gc.get_objects())
    assert gc.get_freeze_count() == 0, "the process may go on with other things"


@pytest.mark.parametrize(
    ("each", "slower"), [(20, 1.0), pytest.param(200, 8.0, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_crowd_of_slow_clients(each: int, slower: float) -> None:
    """All are ended on time while an honest client hardly notices.

    Its first token costs the event loop no more than twice what it does alone, at the 99th percentile, from before the crowd
    comes until it has gone.
    """
    ended: list[tuple[list[float], list[float]]] = []
    for live in serving(patience(slower), launch=launch):
        first_bytes(live, 5)
        idle = worst(first_bytes(live, 100))
        thread = threading.Thread(target=lambda live=live: ended.append(crowd(live, each, each, slower)))
        thread.start()
        busy: list[float] = []
        while thread.is_alive():
            busy += first_bytes(live, 5)
        thread.join()
    heads, bodies = ended[0]
    assert (len(heads), len(bodies)) == (each, each)
    assert max(heads) < slower * HEAD + SLACK
    assert max(bodies) < slower * BODY + SLACK
    assert worst(busy) < 2 * idle + CROWD_SECONDS


TOGETHER = 10
"""Slow clients whose bytes come at the same moment."""
CROWD_SECONDS = 0.01
"""One turn of the event loop in which many of them are ended, since they came together."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of localhost."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
            check=True, capture_output=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no openssl to make a certificate with")
    return cert, key


def test_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    settings = ServerSettings(
        models=(ModelSpec(source="fake", name="fake"),), port=0, lazy=True, drain_seconds=0.2, head_seconds=HEAD,
        ssl_certfile=str(cert), ssl_keyfile=str(key),
    )  # fmt: skip
    for live in serving(settings, launch=launch):
        port = live.url.rsplit(":", 1)[1]
        assert live.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        reply = httpx.post(f"https://localhost:{port}/v1/chat/completions", json=CHAT, verify=context)
        assert reply.json()["choices"][0]["message"]["content"] == "Hello"
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{port}/version")


def test_certificates_that_cannot_be_used(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    (tmp_path / "damaged").write_text("no certificate")
    for one, other in ((tmp_path / "none", key), (tmp_path / "damaged", key), (cert, cert)):
        settings = ServerSettings(port=0, ssl_certfile=str(one), ssl_keyfile=str(other))
        with pytest.raises(ConfigError, match="TLS"):
            serve(settings)
    with pytest.raises(ConfigError, match="ssl-keyfile"):
        ServerSettings(ssl_certfile=str(cert))
