"""Bodies that are JSON, and those that only Python takes for JSON."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from herd.server.errors import ApiError
from herd.server.jsonbody import MAX_DEPTH, strict_json
from tests.server.conftest import faked

GOOD = [
    '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"]}',
    '"[[[[["',
    "[" * MAX_DEPTH + "]" * MAX_DEPTH,
    " 3 ",
    '{"a":"{\\"}"}',
]
BAD = [
    b"", b"{", b"[1,]", b'{"a":1,"a":2}', b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"[-1e999]", b'"\\ud800"',
    b'{"\\udfff":1}',
    b"\xff", b'"\xff"', b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"[" * 100_000, b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
    b'{"a":' * 5000 + b"1" + b"}" * 5000, b"1" * 5000, b"'a'", b"{a:1}", b'"\x01"', b"01", b"+1", b"tru", b"[1]x", b"\x00",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_json_is_read(text: str) -> None:
    assert strict_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        strict_json(data)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 200


def test_large_bodies_are_read_quickly() -> None:
    """A megabyte of brackets inside of strings, and of objects beside each other."""
    for value in ({"a": "[{" * 500_000}, [{"a": i} for i in range(50_000)]):
        data = json.dumps(value).encode()
        began = time.perf_counter()
        assert strict_json(data) == value
        assert time.perf_counter() - began < 2.0, "linear in its length; a busy machine takes its time"


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_every_route_says_so(data: bytes) -> None:
    async def run() -> None:
        async with faked() as fake:
            for path in ("/v1/chat/completions", "/v1/completions"):
                response = await fake.client.post(path, content=data, headers={"Content-Type": "application/json"})
                assert response.status_code == 400
                assert response.json()["error"]["code"] in ("invalid_json", "invalid_type")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({}, 200),
    ],
)
def test_what_the_body_is(headers: dict[str, str], status: int) -> None:
    async def run() -> None:
        async with faked() as fake:
            body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "x"}]}).encode()
            response = await fake.client.post("/v1/chat/completions", content=body, headers=headers)
            assert response.status_code == status

    asyncio.run(run())


def test_paths_and_methods_that_are_not_there() -> None:
    async def run() -> None:
        async with faked() as fake:
            client: httpx.AsyncClient = fake.client
            for method, path, status in (
                ("GET", "/nope", 404),
                ("GET", "/v1/completions", 405),
                ("DELETE", "/health", 405),
            ):
                response = await client.request(method, path)
                assert response.status_code == status
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert (await client.get("/api/nope")).json().keys() == {"error"}
            assert (await client.get("/v1/messages/nope")).json()["type"] == "error"

    asyncio.run(run())
