"""What stands before every API: names, origins, keys, sizes, request ids, and a log that cannot be written into."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import statistics
import time
from collections.abc import Iterator

import pytest

from herd.errors import ConfigError
from herd.server.app import ROUTERS
from herd.server.auth import Keys, hashed, read_keys
from herd.server.gate import _below, is_open
from herd.server.logs import logged
from herd.server.origins import host_allowed, origin_allowed
from herd.server.settings import ServerSettings
from tests.server.conftest import faked
from tests.server.fakes import saying

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "the content of a prompt"}]}
KEY = "sk-one-two-three"
URL = "/v1/chat/completions"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_keys_everybody_may_come() -> None:
    async def go() -> None:
        async with faked() as fake:
            for headers in ({}, bearer("EMPTY"), {"x-api-key": "sk-no-key-required"}):
                assert (await fake.client.post(URL, json=CHAT, headers=headers)).status_code == 200

    asyncio.run(go())


@pytest.mark.parametrize(
    ("root", "path", "left"),
    [
        ("", "/health", "/health"),
        ("/herd", "/herd/health", "/health"),
        ("/herd", "/herdsman/health", "/herdsman/health"),
        ("/herd", "/health", "/health"),
        ("/herd", "/herd", "/herd"),
        ("/v1", "/v1/v1/models", "/v1/models"),
    ],
)
def test_the_root_path_is_a_folder(root: str, path: str, left: str) -> None:
    assert _below(root, path) == left


def test_every_route_but_health_and_the_page_asks_for_the_key() -> None:
    async def go() -> None:
        async with faked(api_keys=(KEY,)) as fake:
            routes = [route for router in ROUTERS for route in router.routes]
            documented = fake.client._transport.app.openapi()["paths"]  # type: ignore[attr-defined]
            found = {
                (getattr(one, "path", ""), method) for one in routes for method in getattr(one, "methods", ()) or ()
            }
            found |= {(path, method.upper()) for path, methods in documented.items() for method in methods}
            assert ("/metrics", "GET") in found
            seen = 0
            for template, method in sorted(found):
                path = re.sub(r"{[^}]*}", "x", template)
                seen += 1
                reply = await fake.client.request(method, path)
                if is_open(path):
                    assert reply.status_code != 401, path
                else:
                    assert reply.status_code == 401, (method, path)
                    assert reply.headers["www-authenticate"] == "Bearer"
            assert seen > 6
            assert (await fake.client.get("/no/such/path")).status_code == 401
            assert (await fake.client.get("/health")).status_code == 200

    asyncio.run(go())


@pytest.mark.parametrize(
    ("headers", "good"),
    [
        (bearer(KEY), True),
        ({"authorization": f"bearer  {KEY} "}, True),
        ({"x-api-key": KEY}, True),
        ({"x-api-key": KEY, **bearer(KEY)}, True),
        (bearer("second"), True),
        (bearer(KEY + " "), True),
        ({}, False),
        (bearer(""), False),
        (bearer(KEY[:-1]), False),
        (bearer(KEY + "x"), False),
        (bearer(KEY.upper()), False),
        ({"authorization": KEY}, False),
        ({"authorization": f"Basic {KEY}"}, False),
        ({"x-api-key": "wrong", **bearer(KEY)}, False),
        ({"x-api-key": "x" * 5000}, False),
        (bearer(hashed(KEY).split()[1]), False),
        (bearer(hashed(KEY).split()[1].removeprefix("sha256:")), False),
    ],
)
def test_keys(headers: dict[str, str], good: bool) -> None:
    async def go() -> None:
        async with faked(api_keys=(KEY, "team second")) as fake:
            reply = await fake.client.get("/v1/models", headers=headers)
            assert reply.status_code == (200 if good else 401)
            if not good:
                assert reply.json()["error"]["code"] == "invalid_api_key"

    asyncio.run(go())


def test_refusals_have_the_shape_of_the_api() -> None:
    async def go() -> None:
        async with faked(api_keys=(KEY,)) as fake:
            assert (await fake.client.post("/v1/messages")).json()["error"]["type"] == "authentication_error"
            assert isinstance((await fake.client.post("/api/chat")).json()["error"], str)

    asyncio.run(go())


def test_keys_are_kept_as_hashes(tmp_path: object) -> None:
    settings = ServerSettings(api_keys=(KEY, f"team {KEY}2"))
    assert KEY not in repr(settings)
    assert settings.api_keys[1].startswith("team sha256:")
    assert ServerSettings(api_keys=settings.api_keys).api_keys == settings.api_keys
    found = Keys(settings.api_keys).find([(b"x-api-key", KEY.encode())])
    assert found is not None
    assert found.name == settings.api_keys[0].split()[0]


def test_files_of_keys(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# ours\n{KEY}   # the first\n\nteam  {hashed('second').split()[1]}\n")
    names = [entry.split()[0] for entry in read_keys(file)]
    assert names[1] == "team"
    assert Keys(read_keys(file)).find([(b"x-api-key", b"second")]) is not None
    for wrong, said in (("", "no API key"), ("a b c\n", "line 1"), ("ok\nschlüssel\n", "line 2"), ("a/b c", "line 1")):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=said):
            read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(file.with_name("none"))


LOCAL = ["localhost", "localhost:8000", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "LOCALHOST", "x.localhost"]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "a b",
           "localhost@evil.example", "localhost:8000:1", "[::2]", "[::ffff:10.0.0.1]", "0.0.0.0"]  # fmt: skip


def test_names_of_this_machine_only() -> None:
    for host in LOCAL:
        assert host_allowed(host, "127.0.0.1", ()), host
    for host in FOREIGN:
        assert not host_allowed(host, "127.0.0.1", ()), host
    assert host_allowed("anything.example", "0.0.0.0", ())
    assert not host_allowed("anything.example", "0.0.0.0", ("herd.example",))
    assert host_allowed("Herd.example:8000", "127.0.0.1", ("herd.example",))
    assert host_allowed("a.example", "127.0.0.1", ("*",))


def test_dns_rebinding_is_refused() -> None:
    async def go() -> None:
        async with faked() as fake:
            for path in ("/health", "/", "/v1/models"):
                reply = await fake.client.get(path, headers={"Host": "evil.example:8000"})
                assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")

    asyncio.run(go())


def test_pages_from_elsewhere() -> None:
    assert origin_allowed("http://localhost:8000", "localhost:8000", ())
    for origin in (
        "null",
        "http://localhost:3000",
        "http://evil.example",
        "file://",
        "app://x",
        "http://localhost:8000.x",
    ):
        assert not origin_allowed(origin, "localhost:8000", ()), origin
    assert origin_allowed("https://A.example", None, ("https://a.example/",))

    async def go() -> None:
        evil, good = {"Origin": "https://evil.example"}, {"Origin": "https://good.example"}
        async with faked(allowed_origins=("https://good.example",)) as fake:
            assert (await fake.client.post(URL, json=CHAT, headers=evil)).status_code == 403
            assert (await fake.client.get("/v1/models", headers=evil)).status_code == 403
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type, x-a"}
            refused = await fake.client.options(URL, headers=evil | asked)
            assert refused.status_code == 403
            assert "access-control-allow-origin" not in refused.headers
            reply = await fake.client.options(URL, headers=good | asked)
            assert reply.status_code == 204
            assert reply.headers["access-control-allow-origin"] == "https://good.example"
            assert reply.headers["access-control-allow-headers"] == "content-type, x-a"
            assert "access-control-allow-credentials" not in reply.headers
            reply = await fake.client.post(URL, json=CHAT, headers=good)
            assert reply.status_code == 200
            assert reply.headers["access-control-allow-origin"] == "https://good.example"
            own = await fake.client.post(URL, json=CHAT, headers={"Origin": "http://localhost"})
            assert own.status_code == 200
            assert "access-control-allow-origin" not in own.headers

    asyncio.run(go())


def test_preflights_need_no_key() -> None:
    async def go() -> None:
        async with faked(api_keys=(KEY,), allowed_origins=("*",)) as fake:
            reply = await fake.client.options(URL, headers={"Origin": "https://a.example"})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (204, "https://a.example")

    asyncio.run(go())


def test_request_ids() -> None:
    async def go() -> None:
        async with faked() as fake:
            reply = await fake.client.get("/version", headers={"X-Request-Id": "mine-1.2:3"})
            assert reply.headers["x-request-id"] == "mine-1.2:3"
            for hostile in ("", "a b", "x" * 129, "a\tb", "<script>", "ü".encode()):
                made = (await fake.client.get("/version", headers={"X-Request-Id": hostile})).headers["x-request-id"]
                assert re.fullmatch(r"req-[0-9a-f]{24}", made)
            assert (await fake.client.get("/nothing")).headers["x-request-id"].startswith("req-")
            reply = await fake.client.post("/v1/messages", json={})
            assert reply.headers["request-id"] == reply.headers["x-request-id"]

    asyncio.run(go())


def test_bodies_that_are_too_large() -> None:
    async def go() -> None:
        async with faked(max_body=1000) as fake:
            reply = await fake.client.post(URL, content=b"x" * 1001)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
            sent = 0

            async def chunks():  # type: ignore[no-untyped-def]
                nonlocal sent
                for _ in range(1000):
                    sent += 100
                    yield b"x" * 100

            reply = await fake.client.post(URL, content=chunks())
            assert reply.status_code == 413
            fits = json.dumps(CHAT).encode()
            assert (await fake.client.post(URL, content=fits + b" " * (1000 - len(fits)))).status_code == 200
            for length in ("-1", "1e3", "9" * 30, "0x10"):
                reply = await fake.client.post(URL, content=fits, headers={"Content-Length": length})
                assert reply.status_code == 413, length

    asyncio.run(go())


def test_the_servers_end_is_said_to_everybody() -> None:
    async def go() -> None:
        async with faked() as fake:
            fake.state.draining = True
            for path in (URL, "/v1/completions", "/v1/embeddings"):
                reply = await fake.client.post(path, json={})
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert (await fake.client.get("/health")).status_code == 503

    asyncio.run(go())


HOSTILE = ["a\nb", "a\r\nINFO forged", "\x1b[31mred", "a\u2028b", "\u202eevil", "a\x00b", "\x85", "\ud800"]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the log goes."""
    out = io.StringIO()
    yield out
    out.close()


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_forges_a_line_of_the_log(form: str, stream: io.StringIO) -> None:
    with logged("info", form, stream):
        for number, text in enumerate(HOSTILE):
            logging.getLogger("herd.server").info("%s and %s", text, number, extra={"fields": {"path": text}})
    lines = stream.getvalue().split("\n")
    assert len(lines) == len(HOSTILE) + 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800]", stream.getvalue())
    assert len(stream.getvalue().splitlines()) == len(HOSTILE)


def test_the_log_has_requests_and_no_prompts(stream: io.StringIO) -> None:
    async def go() -> None:
        async with faked(lambda call: saying("the secret reply"), api_keys=(f"team {KEY}",)) as fake:
            reply = await fake.client.post(URL, json=CHAT, headers=bearer(KEY) | {"X-Request-Id": "abc"})
            assert reply.status_code == 200
            await fake.client.post(URL + "%0aforged", json=CHAT, headers=bearer("wrong key"))
            await fake.client.post(URL, content=b'{"model": "the content', headers=bearer(KEY))

    with logged("debug", "json", stream):
        asyncio.run(go())
    log = stream.getvalue()
    rows = [json.loads(line) for line in log.splitlines()]
    requests = [row for row in rows if row["logger"] == "herd.access"]
    assert [row["status"] for row in requests] == [200, 401, 400]
    first = requests[0]
    assert (first["request"], first["key"], first["model"], first["method"]) == ("abc", "team", "fake", "POST")
    assert (first["prompt_tokens"], first["generated_tokens"], first["path"]) == (3, 1, URL)
    for secret in ("the content", "secret reply", KEY, "wrong key"):
        assert secret not in log


def test_refusals_are_quick() -> None:
    """A refusal does no work: 200 of them while nothing is loaded."""

    async def go() -> None:
        async with faked(api_keys=(KEY,)) as fake:
            taken = []
            for _ in range(200):
                began = time.perf_counter()
                assert (await fake.client.post(URL, json=CHAT)).status_code == 401
                taken.append(time.perf_counter() - began)
            assert statistics.median(taken) < QUICK
            assert not fake.made

    asyncio.run(go())


QUICK = 0.02
"""Seconds, of the median; 0.5 ms on an idle machine."""
