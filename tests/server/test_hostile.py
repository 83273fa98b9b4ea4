"""Requests that want to do harm: none is answered with 5xx, none takes long, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from herd.server.process import WorkerError
from herd.server.settings import ModelSpec, ServerSettings
from tests.server.conftest import Live, faked, serving
from tests.server.fakes import Scripted, saying
from tests.server.health import held_to_the_bar

URL = "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
ROUTES = (URL, "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/v1/messages", "/api/chat",
          "/api/generate", "/v1/moderations", "/detokenize")  # fmt: skip
DEEP = 100_000


def wrapped(value: str) -> bytes:
    return f'{{"model": "fake", "messages": [{{"role": "user", "content": {value}}}]}}'.encode(errors="surrogatepass")


TORTURE: dict[str, bytes] = {
    "nothing": b"",
    "spaces": b"   \n\t",
    "half": b'{"model": "fake", "mess',
    "array": b"[]",
    "null": b"null",
    "number": b"5",
    "string": b'"x"',
    "deep arrays": b"[" * DEEP,
    "deep closed": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep content": wrapped("[" * DEEP + "]" * DEEP),
    "NaN": wrapped("NaN"),
    "Infinity": wrapped("-Infinity"),
    "huge": wrapped("1e999"),
    "long integer": wrapped("9" * 5000),
    "longer integer": wrapped("9" * 500_000),
    "lone surrogate": wrapped(r'"\ud800"'),
    "lone low surrogate": wrapped(r'"a\udc00b"'),
    "raw surrogate": wrapped('"\ud800"'),
    "surrogate key": b'{"\\ud800": 1}',
    "same key twice": b'{"model": "fake", "model": "fake", "messages": []}',
    "NUL": wrapped(r'"\u0000"'),
    "raw NUL": wrapped('"\x00"'),
    "control": wrapped('"\x01"'),
    "UTF-16": wrapped('"hi"').decode().encode("utf-16"),
    "UTF-32": wrapped('"hi"').decode().encode("utf-32"),
    "Latin-1": wrapped('"x"').replace(b"x", b"\xe9"),
    "overlong": wrapped('"x"').replace(b"x", b"\xc0\xaf"),
    "GBK": "你好".encode("gbk"),
    "byte order mark": b"\xef\xbb\xbf" + wrapped('"hi"'),
    "comments": b"{/* x */}",
    "single quotes": b"{'model': 'fake'}",
    "trailing": wrapped('"hi"') + b"x",
    "two": wrapped('"hi"') * 2,
    "trailing comma": b'{"model": "fake",}',
    "many keys": json.dumps({f"k{i}": i for i in range(50_000)}).encode(),
    "many messages": json.dumps({"model": "fake", "messages": [HI] * 20_000}).encode(),
    "10 MB string": wrapped(f'"{"x" * 10_000_000}"'),
    "10 MB of escapes": wrapped('"' + r"\u00e9" * 1_600_000 + '"'),
    "long model": json.dumps({"model": "x" * 1_000_000, "messages": [HI]}).encode(),
    "hostile model": json.dumps({"model": "../../etc/passwd\x00\n\x1b[31m", "messages": [HI]}).encode(),
    "random": random.Random(1).randbytes(100_000),
}


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions to the model that is not there are refused: these tests are about the server."""

    async def ask(self: Scripted, what: str, **args: Any) -> Any:
        raise WorkerError("not this time", kind="PromptError")

    monkeypatch.setattr(Scripted, "ask", ask)


@pytest.mark.usefixtures("refusing")
def test_bodies_that_are_no_requests() -> None:
    """On every route: 4xx (or 200 where it is a request after all), with a body in JSON that repeats nothing of it."""

    async def go() -> None:
        async with faked() as fake:
            for route in ROUTES:
                for name, body in TORTURE.items():
                    if route != URL and len(body) > 1_000_000:
                        continue
                    reply = await fake.client.post(route, content=body, headers={"Content-Type": "application/json"})
                    assert reply.status_code < 500, (route, name, reply.text[:200])
                    assert reply.status_code == 200 or reply.json(), (route, name)
                    assert reply.status_code == 200 or len(reply.content) < 2000, (route, name)
                    assert "\\ud800" not in reply.text

    asyncio.run(go())


def numbers() -> Iterator[tuple[str, Any]]:
    """Fields of a request and values that no server may act on."""
    for name, values in {
        "n": (129, 10**9, 2**63, 0, -1, 1.5, "2", True, [], {}),
        "top_logprobs": (21, 10**6, -1, 0.5, "5", [1]),
        "max_tokens": (10**18 * 100, -1, 0, 1.5, "x", [], -(10**30)),
        "max_completion_tokens": (-5, 2**64, 0),
        "temperature": (-1, 1e300, "hot", [], {}),
        "top_p": (0, 1.1, -1, 10**400, "x"),
        "top_k": (-2, 2**64, 1.5),
        "min_p": (-0.1, 1.1),
        "presence_penalty": (2.1, -3, "x"),
        "frequency_penalty": (10**10, -2.5),
        "repetition_penalty": (0, -1, 1e9),
        "seed": (2**64, -(2**64), "x", 1.5),
        "stop": (["a"] * 5, "x" * 257, ["x" * 257], "", [""], [1], 5),
        "logit_bias": ({str(i): 1 for i in range(1025)}, {"x": 1}, {"-1": 1}, {"1": 101}, {"1": "a"}, []),
        "messages": ([HI] * 2049, [], {}, "hi", [1], [{}], [{"role": "x", "content": "y"}]),
        "tools": ([{"type": "function", "function": {"name": "f"}}] * 129, [{}], "x"),
        "metadata": ({str(i): "x" for i in range(17)}, {"a": 1}, {"a": "x" * 513}),
        "stop_token_ids": ([-1], [2**64], [0] * 1025, ["x"]),
        "prompt_logprobs": (10**6, -1),
        "stream": ("yes", 1, []),
        "model": ("", 5, None, [], "x" * 513),
        "cache_salt": ("x" * 257, 5),
        "user": ("x" * 1025, 5),
        "chat_template_kwargs": ({str(i): 1 for i in range(17)}, []),
        "unknown": (1,),
    }.items():
        for value in values:
            yield name, value


LIMIT_SECONDS = 0.05
"""The bar of each refusal; medians are held to it, so that a pause of the machine is no failure."""


def test_limits_are_told_at_once() -> None:
    async def go() -> None:
        async with faked() as fake:
            await fake.client.post(URL, json={"model": "fake", "messages": [HI]})
            seen = len(fake.model.seen)
            for name, value in numbers():
                body = {"model": "fake", "messages": [HI]} | {name: value}
                if name == "top_logprobs":
                    body["logprobs"] = True
                content = json.dumps(body)
                taken = []
                for _ in range(3):
                    began = time.thread_time()  # what others do on this machine is no fault of the server
                    reply = await fake.client.post(URL, content=content)
                    taken.append(time.thread_time() - began)
                    error = reply.json().get("error")
                    assert reply.status_code == 400, (name, str(value)[:50], reply.text[:200])
                    assert (error["param"] or "").split("[")[0].split(".")[0] == name or error["code"] == "invalid_json", (
                        name, str(value)[:50], error)  # fmt: skip
                assert statistics.median(taken) < LIMIT_SECONDS, (name, str(value)[:50])
            prompts = ["x"] * 129
            for body in (
                {"prompt": prompts},
                {"prompt": [[1]] * 129},
                {"prompt": "x" * 2_000_000, "n": 128},
                {"prompt": "hi", "best_of": 10**9},
                {"prompt": [-1]},
                {"prompt": [2**64]},
            ):
                reply = await fake.client.post("/v1/completions", json={"model": "fake", **body})
                assert reply.status_code == 400, str(body)[:80]
            assert len(fake.model.seen) == seen, "a refused request reached the model"

    asyncio.run(go())


PARALLEL, MEGABYTES = 20, 100
GROWTH = 32 << 20


def test_huge_posts_take_no_memory(live: Live) -> None:
    """Twenty posts that announce 100 MB each: refused before their bodies are read."""
    host, port = live.url.removeprefix("http://").split(":")
    before = _memory()
    replies: list[bytes] = []

    def post() -> None:
        with socket.create_connection((host, int(port))) as connection:
            connection.settimeout(20)
            head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MEGABYTES << 20}\r\n\r\n"
            connection.sendall(head.encode() + b" " * 65536)
            replies.append(connection.recv(100))

    threads = [threading.Thread(target=post) for _ in range(PARALLEL)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply[:12] for reply in replies] == [b"HTTP/1.1 413"] * PARALLEL
    assert _memory() - before < GROWTH


BODIES = 8 << 20
"""What all bodies together may take in this test."""
ROOM = 24 << 20
"""Memory beside it: pieces before they are joined, buffers of twenty connections, what the allocator keeps."""


def test_many_bodies_of_unknown_length_take_little_memory() -> None:
    """Twenty chunked bodies of 6 MB each that do not end: most get 503, and small requests are answered beside them."""

    def launch(spec: ModelSpec) -> Scripted:
        return Scripted(spec, lambda call: saying("Hello"))

    piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    spec = ModelSpec(source="fake", name="fake")
    settings = ServerSettings(models=(spec,), port=0, max_body=7 << 20, max_bodies=BODIES)
    with contextlib.contextmanager(serving)(settings, launch=launch) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with live.client() as client:
            assert client.post(URL, json={"model": "fake", "messages": [HI]}).status_code == 200
        before, most, replies = _memory(), 0, []
        ended = threading.Event()
        held = threading.Semaphore(0)

        def post() -> None:
            with socket.create_connection((host, int(port))) as connection:
                connection.settimeout(20)
                head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                with contextlib.suppress(ConnectionError):
                    connection.sendall(head.encode())
                    for _ in range(6):
                        connection.sendall(piece)
                connection.settimeout(0.5)
                reply = b""
                with contextlib.suppress(TimeoutError, ConnectionError):
                    while b"server_busy" not in reply and (more := connection.recv(4096)):
                        reply += more
                replies.append(reply)
                held.release()
                ended.wait(60)

        threads = [threading.Thread(target=post) for _ in range(PARALLEL)]
        for thread in threads:
            thread.start()
        for _ in threads:
            while not held.acquire(timeout=0.01):
                most = max(most, _memory())
        with live.client() as client:
            small = client.post(URL, json={"model": "fake", "messages": [HI]})
            assert 0 < live.state.counts.bodies <= BODIES
            counted = client.get("/metrics").text
        most = max(most, _memory())
        ended.set()
        for thread in threads:
            thread.join()
        assert small.status_code == 200, "small requests are taken while large ones fill the rest"
        read = [reply for reply in replies if b"server_busy" in reply]
        assert read, "somebody has read why, though who sends on for more than a megabyte may not"
        for reply in read:
            assert reply[:12] == b"HTTP/1.1 503"
            assert b"retry-after: 1" in reply.lower()
        found = re.search(r'herd_requests_refused_total{limit="bodies"} ([0-9.]+)', counted)
        assert found is not None
        assert PARALLEL - BODIES // (5 << 20) - 1 <= float(found[1]) < PARALLEL, (
            "8 MiB hold one body of 6, and part of others"
        )
        assert most - before < BODIES + ROOM
        with live.client() as client:
            until = time.monotonic() + 10
            while live.state.counts.bodies:
                assert time.monotonic() < until, "what was held is not given back"
                time.sleep(0.01)
            large = {"model": "fake", "messages": [HI], "user": " " * 10}
            content = json.dumps(large).encode() + b" " * (6 << 20)
            assert client.post(URL, content=content, headers={"Content-Type": "application/json"}).status_code == 200
        until = time.monotonic() + 10
        while live.state.counts.bodies:
            assert time.monotonic() < until, "the last one is not given back"
            time.sleep(0.01)


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


ASKED = 100
"""Times that /health is asked: all of them but one are held to the bar."""
WORDS = {"type": "object", "properties": {f"p{i}": {"enum": [f"{i}-{j}" for j in range(200)]} for i in range(50)}}


def test_health_answers_while_prompts_and_schemas_are_handled(live: Live) -> None:
    """A prompt of a megabyte, a schema of 10,000 words and a regex that grows, again and again, beside /health."""
    hard: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a" * 1_000_000}]},
        {"messages": [HI], "max_tokens": 4, "guided_json": WORDS},
        {"messages": [HI], "max_tokens": 4, "structured_outputs": {"regex": "(a|b){1,2000}(c|d){1,2000}"}},
    ]  # fmt: skip
    with live.client() as client:
        client.post(URL, json={"model": "json", "messages": [HI], "max_tokens": 1})  # it is loaded
    works = [lambda client, body=body: client.post(URL, json={"model": "json", **body}).status_code for body in hard]
    assert held_to_the_bar(live, works, asked=ASKED, answered=2 * len(hard)) <= {200, 400}


STEADY = 0.1
"""Growth of the worker's memory after many requests, beside what its first ones made it take."""


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_dropped_requests_leave_nothing(live: Live, count: int) -> None:
    """Clients that go away before the head is sent, in the middle of it, while the prompt is computed, in the middle of the
    reply and at its end, streamed or not: two seconds later nothing runs, no block is held and no descriptor is open."""
    with live.client() as client:
        client.post(URL, json={"model": "nano", "messages": [HI], "max_tokens": 2})
    host, port = live.url.removeprefix("http://").split(":")
    process = live.state.models.slots["nano"].process
    assert process is not None
    rng = random.Random(count)

    def drop(stage: int, stream: bool) -> None:
        body = json.dumps(
            {"model": "nano", "stream": stream, "ignore_eos": True, "max_tokens": 2 if stage == 5 else 300,
             "messages": [{"role": "user", "content": "Tell a story. " * (100 if stage == 3 else 2)}]}
        ).encode()  # fmt: skip
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        with socket.create_connection((host, int(port))) as connection:
            connection.settimeout(10)
            if stage == 0:
                return
            if stage in (1, 2):
                connection.sendall(data[: len(head) - 10 if stage == 1 else len(head) + 10])
                return
            connection.sendall(data)
            if stage == 3:
                time.sleep(rng.random() * 0.02)
            elif stream:
                connection.recv(100 if stage == 4 else 65536)
            else:
                time.sleep(0.03)

    before_fds, before = len(os.listdir("/proc/self/fd")), process.memory() or 0
    for start in range(0, count, 10):
        threads = [threading.Thread(target=drop, args=(i % 6, i % 2 == 0)) for i in range(start, start + 10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    until = time.monotonic() + 2.0 + 1.5  # the bar, and a beat of the worker
    while True:
        stats = process.stats
        idle = not live.state.running and not process.calls and stats.get("running") == stats.get("waiting") == 0
        if idle and stats["blocks_used"] == 0:
            break
        assert time.monotonic() < until, (stats, process.calls, len(live.state.running))
        time.sleep(0.05)
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before_fds + 3:
        assert time.monotonic() < deadline, "file descriptors are left open"
        time.sleep(0.05)
    if count > 1000:
        assert (process.memory() or 0) < before * (1 + STEADY)
    with live.client() as client:
        assert client.post(URL, json={"model": "nano", "messages": [HI], "max_tokens": 2}).status_code == 200


def test_settings_that_make_no_sense() -> None:
    from herd.errors import ConfigError

    for wrong in ({"rate_requests": 0}, {"max_body": 0}, {"allowed_origins": ("evil",)}, {"api_keys": ("a b c",)},
                  {"head_seconds": -1}, {"ssl_keyfile": "x"}):  # fmt: skip
        with pytest.raises(ConfigError):
            ServerSettings(**wrong)  # type: ignore[arg-type]
