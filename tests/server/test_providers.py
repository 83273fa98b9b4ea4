"""Models of other servers: a scripted one on loopback (a plain socket server of the standard library), and herd itself."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import httpx
import openai
import pytest

from herd.cli.serve import command, settings_from
from herd.errors import ConfigError
from herd.server.cluster import check_replicas
from herd.server.providers.spec import ProviderSpec
from herd.server.settings import ModelSpec, ServerSettings
from tests.server.conftest import Live, faked, serving
from tests.server.fakes import Scripted, saying

KEY = "sk-upstream-0123456789"
WAIT_SECONDS = 20.0
"""For something that happens at once on an idle machine."""
CHAT = {"model": "far/big/model", "messages": [{"role": "user", "content": "Héllo"}]}


@dataclass
class Stub:
    """OpenAI's API, scripted: `answer(handler, body)` writes what it likes. `seen` is (path, headers, body)."""

    server: ThreadingHTTPServer
    answer: Callable[[BaseHTTPRequestHandler, Any], None] | None = None
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    broken: threading.Event = field(default_factory=threading.Event)
    """Its client went away while it was writing."""
    models: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/base/v1"


def reply(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def stream(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """Server-sent events, until the connection ends."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(data)
    handler.wfile.flush()
    handler.close_connection = True


@pytest.fixture
def stub() -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._take(None)

        def do_POST(self) -> None:
            self._take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _take(self, body: Any) -> None:
            made.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            if body is None:
                rows = [{"id": "big/model", "object": "model", "created": 7, "owned_by": "them"}, {"id": "small"}]
                return reply(self, 200, made.models or {"object": "list", "data": rows})
            assert made.answer is not None
            try:
                made.answer(self, body)
            except OSError:
                made.broken.set()
                self.close_connection = True

        def log_message(self, *args: Any) -> None: ...

    made = Stub(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    made.server.daemon_threads = True
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def settings(stub: Stub, **more: Any) -> dict[str, Any]:
    return {"providers": (ProviderSpec(name="far", url=stub.url),)} | more


@pytest.fixture
def near(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A live server with the local model "fake" and the stub as provider "far"; clients need the key "local-key"."""
    monkeypatch.setenv("HERD_PROVIDER_FAR_KEY", KEY)
    told = settings(stub, models=(ModelSpec(source="fake", name="fake"),), lazy=True, port=0, drain_seconds=1)
    yield from serving(
        ServerSettings(**told, api_keys=("local-key",)), launch=lambda spec: Scripted(spec, lambda call: saying("Hi"))
    )


def client_of(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="local-key", max_retries=0)


def in_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """An asynchronous test as one that pytest runs."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


def until(done: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def whole(model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Bonjour \u2028 \U0001f600"}
    return {
        "id": "up-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "theirs": [1.5, None]}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9},
    }


def chunk(text: str | None, reason: str | None = None) -> str:
    delta = {} if text is None else {"content": text}
    said = {"id": "up-1", "object": "chat.completion.chunk", "created": 1, "model": "big/model-2024"}
    choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
    return json.dumps(said | {"choices": choices}, ensure_ascii=False)


def test_one_endpoint_serves_both(stub: Stub, near: Live) -> None:
    stub.answer = lambda handler, body: reply(handler, 200, whole(body["model"]), X_Theirs="1", Set_Cookie="a=b")
    client = client_of(near)
    assert [row.id for row in client.models.list()] == ["fake", "far/big/model", "far/small"]
    assert client.models.retrieve("far/big/model").owned_by == "them"
    with pytest.raises(openai.NotFoundError, match="lists no model"):
        client.models.retrieve("far/none")
    local = client.chat.completions.create(model="fake", messages=CHAT["messages"])  # type: ignore[arg-type]
    assert local.choices[0].message.content == "Hi"
    raw = client.chat.completions.with_raw_response.create(
        **CHAT,  # type: ignore[arg-type]
        temperature=0.5,
        extra_body={"their_own": {"x": [1, None]}},
        extra_headers={"Cookie": "c=d", "OpenAI-Organization": "mine"},
    )
    assert raw.parse().model == "far/big/model"
    assert raw.parse().choices[0].message.content == "Bonjour \u2028 \U0001f600".encode(
        "utf-16", "surrogatepass"
    ).decode("utf-16")
    assert json.loads(raw.text)["choices"][0]["theirs"] == [1.5, None], "what they add stays"
    assert "x-theirs" not in raw.headers
    assert "set-cookie" not in raw.headers
    path, headers, body = stub.seen[-1]
    assert path == "/base/v1/chat/completions"
    assert body == CHAT | {"model": "big/model", "temperature": 0.5, "their_own": {"x": [1, None]}}
    assert headers["authorization"] == f"Bearer {KEY}"
    assert not {"cookie", "openai-organization", "x-api-key"} & set(headers)
    assert "local-key" not in str(stub.seen), "a client's own key stays here"
    assert sum(path.endswith("/models") for path, *_ in stub.seen) == 1, "the list is kept for a minute"
    told = client._client.get(f"{near.url}/metrics", headers={"Authorization": "Bearer local-key"}).text
    assert 'herd_generation_tokens_total{model_name="far/big/model"} 4.0' in told
    assert 'finished_reason="stop",model_name="far/big/model"' in told
    assert not near.state.running


def test_the_gate_stands_before_providers(stub: Stub, near: Live) -> None:
    with near.client() as http:
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 401
        assert http.get("/health").json()["providers"] == {"far": {"state": "unasked"}}
        headers = {"Authorization": "Bearer local-key"}
        twice = b'{"model":"far/small","model":"far/small","messages":[]}'
        kind = {"Content-Type": "application/json"}
        assert http.post("/v1/chat/completions", content=twice, headers=headers | kind).status_code == 400
        form = http.post(
            "/v1/chat/completions", content=json.dumps(CHAT), headers=headers | {"Content-Type": "text/plain"}
        )
        assert form.status_code == 415
    assert stub.seen == []


def test_streams_as_they_come(stub: Stub, near: Live) -> None:
    go_on = threading.Event()

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        stream(handler, f": hello\r\n\r\ndata: {chunk('a')}\r\n\r\n".encode())
        assert go_on.wait(WAIT_SECONDS)
        text = chunk("é\u2028b")
        second = f"data:{text}\n\ndata: {chunk(None, 'stop')}\n\n".encode()
        for i in range(0, len(second), 7):  # through the middle of characters and lines
            handler.wfile.write(second[i : i + 7])
            handler.wfile.flush()
        handler.wfile.write(b"data: [DONE]\n\n")

    stub.answer = answer
    chunks = client_of(near).chat.completions.create(**CHAT, stream=True)  # type: ignore[call-overload]
    first = next(chunks)
    assert (first.model, first.choices[0].delta.content) == ("far/big/model", "a"), "it came before the rest was made"
    go_on.set()
    rest = list(chunks)
    assert [c.choices[0].delta.content for c in rest] == ["é\u2028b", None]
    assert rest[-1].choices[0].finish_reason == "stop"
    assert {c.model for c in rest} == {"far/big/model"}
    assert "stream_options" not in stub.seen[-1][2]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (f"data: {chunk('a')}\n\n", "far broke off its answer"),
        (f"data: {chunk('a')}\n\ndata: {{not json\n\n", "far sent an event that is no JSON object"),
        (f'data: {chunk("a")}\n\ndata: {{"error": {{"message": "no {KEY} left", "code": 7}}}}\n\n', "no [key] left"),
    ],
)
def test_what_goes_wrong_in_a_stream_is_its_last_event(stub: Stub, near: Live, sent: str, said: str) -> None:
    stub.answer = lambda handler, body: stream(handler, sent.encode())
    with near.client(headers={"Authorization": "Bearer local-key"}) as http:
        lines = http.post("/v1/chat/completions", json=CHAT | {"stream": True}).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == said
    assert len(lines) == 3


def test_errors_are_kept(stub: Stub, near: Live, caplog: pytest.LogCaptureFixture) -> None:
    said = {"error": {"message": f"slow down, {KEY}", "type": "requests", "param": "x", "code": "limit"}}
    stub.answer = lambda handler, body: reply(handler, 429, said, Retry_After="7")
    caplog.set_level(logging.DEBUG)
    with near.client(headers={"Authorization": "Bearer local-key"}) as http:
        for streams in (False, True):
            answer = http.post("/v1/chat/completions", json=CHAT | {"stream": streams})
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "7"
            assert answer.json() == {"error": said["error"] | {"message": "slow down, [key]"}}
        for status, body, wanted, message in (
            (404, {"error": "no such model"}, 404, "no such model"),
            (500, b"<html>", 500, "far answered with status 500, and no reason"),
            (401, {"error": {"message": KEY}}, 502, "far does not take this server's key"),
            (302, b"", 502, "far sends requests elsewhere, which are not followed: mount the address itself"),
            (200, b"[1]", 502, "far answered with no JSON object"),
            (200, b'{"choices": NaN}', 502, "far answered with no JSON object"),
        ):
            stub.answer = lambda h, _, s=status, b=body: reply(h, s, b, Location="http://127.0.0.1:1/v1/x")
            for path in ("chat/completions", "completions", "embeddings"):
                answer = http.post(f"/v1/{path}", json=CHAT)
                assert (answer.status_code, answer.json()["error"]["message"]) == (wanted, message)
                assert stub.seen[-1][0] == f"/base/v1/{path}"
        stub.answer = lambda handler, body: reply(handler, 200, whole("x"))
        answer = http.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert (answer.status_code, answer.json()["error"]["message"]) == (502, "far did not answer with a stream")
        told = http.get("/metrics").text
    assert 'herd_request_failure_total{kind="Status404",model_name="far/other"} 3.0' in told, (
        "clients' names are no labels"
    )
    assert KEY not in caplog.text


def test_a_client_that_goes_closes_the_provider(stub: Stub, near: Live) -> None:
    arrived = threading.Event()

    def endless(handler: BaseHTTPRequestHandler, body: Any) -> None:
        stream(handler, b"") if body["stream"] else None
        arrived.set()
        line = f"data: {chunk('x')}\n\n".encode()
        end = time.monotonic() + WAIT_SECONDS
        handler.connection.settimeout(0.05)
        while time.monotonic() < end:
            if body["stream"]:
                handler.wfile.write(line)
                time.sleep(0.02)
                continue
            try:
                if handler.connection.recv(1) == b"":
                    raise ConnectionResetError
            except TimeoutError:
                pass

    stub.answer = endless
    for streams in (True, False):
        arrived.clear()
        stub.broken.clear()
        body = json.dumps(CHAT | {"stream": streams}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer local-key\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", httpx.URL(near.url).port or 0)) as connection:
            connection.sendall(head.encode() + body)
            assert arrived.wait(WAIT_SECONDS)
            if streams:
                assert connection.recv(100)
            assert len(near.state.running) == 1
        assert stub.broken.wait(WAIT_SECONDS), f"{streams=}"
        until(lambda: not near.state.running)
    assert near.state.providers.all["far"].users == 0


def test_a_server_that_ends_ends_streams(stub: Stub, near: Live) -> None:
    hold = threading.Event()

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        stream(handler, f"data: {chunk('a')}\n\n".encode())
        hold.wait(WAIT_SECONDS)

    stub.answer = answer
    chunks = client_of(near).chat.completions.create(**CHAT, stream=True)  # type: ignore[call-overload]
    next(chunks)
    near.loop.call_soon_threadsafe(near.state.stop_all, "the server is shutting down")
    with pytest.raises(openai.APIError, match="shutting down"):
        list(chunks)
    hold.set()


@in_loop
async def test_a_provider_that_is_down_costs_its_own_models_only(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port, and it refuses
        taken.bind(("127.0.0.1", 0))
        down = ProviderSpec(name="down", url=f"http://127.0.0.1:{taken.getsockname()[1]}")
        async with faked(providers=(down,)) as fake:
            for _ in range(2):
                listed = (await fake.client.get("/v1/models")).json()["data"]
                assert [row["id"] for row in listed] == ["fake", "a"]
            assert caplog.text.count("provider down is left out of the list of models") == 1
            health = await fake.client.get("/health")
            assert (health.status_code, health.json()["providers"]) == (200, {"down": {"state": "failed"}})
            assert (await fake.client.get("/v1/models/down/x")).status_code == 502
            answer = await fake.client.post("/v1/chat/completions", json=CHAT | {"model": "down/x"})
            assert (answer.status_code, answer.json()["error"]["message"]) == (502, "down cannot be reached")
            assert (await fake.client.post("/v1/chat/completions", json=CHAT | {"model": "fake"})).status_code == 200


@in_loop
async def test_other_apis_say_what_works(stub: Stub) -> None:
    chat = {"model": "far/small", "messages": [{"role": "user", "content": "x"}]}
    async with faked(**settings(stub)) as fake:
        for path, body in (
            ("/v1/messages", chat | {"max_tokens": 5}),
            ("/v1/responses", {"model": "far/small", "input": "x"}),
            ("/api/chat", chat),
            ("/api/embed", {"model": "far/small", "input": "x"}),
            ("/api/generate", {"model": "far/small", "prompt": "x"}),
            ("/tokenize", {"model": "far/small", "prompt": "x"}),
        ):
            answer = await fake.client.post(path, json=body)
            assert answer.status_code == 400, path
            assert "/v1/chat/completions" in answer.text
        unknown = await fake.client.post("/v1/chat/completions", json=chat | {"model": "other/small"})
        assert unknown.status_code == 404, "a prefix that is no provider's"
    assert stub.seen == []


@in_loop
async def test_batches_may_be_for_a_provider(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda handler, body: reply(handler, 200, whole(body["model"]))
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    async with faked(**settings(stub, state_dir=str(tmp_path))) as fake:
        given = {"file": ("in.jsonl", json.dumps(line).encode())}
        sent = await fake.client.post("/v1/files", data={"purpose": "batch"}, files=given)
        body = {"input_file_id": sent.json()["id"], "endpoint": line["url"], "completion_window": "24h"}
        batch = (await fake.client.post("/v1/batches", json=body)).json()
        end = time.monotonic() + WAIT_SECONDS
        while batch["status"] != "completed":
            assert time.monotonic() < end, batch
            await asyncio.sleep(0.02)
            batch = (await fake.client.get(f"/v1/batches/{batch['id']}")).json()
        told = (await fake.client.get(f"/v1/files/{batch['output_file_id']}/content")).json()
    assert (told["response"]["status_code"], told["response"]["body"]["model"]) == (200, CHAT["model"])
    assert stub.seen[-1][2]["model"] == "big/model"


@in_loop
async def test_rates_count_what_a_provider_made(stub: Stub) -> None:
    usage = {"choices": [], "model": "m", "usage": {"prompt_tokens": 60, "completion_tokens": 50}}
    sent = f"data: {chunk('a', 'stop')}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n"
    stub.answer = lambda handler, body: stream(handler, sent.encode())
    async with faked(**settings(stub, rate_tokens=100)) as fake:
        first = await fake.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert first.status_code == 200
        assert "usage" not in first.text, "the client did not ask for it"
        assert first.text.count("data:") == 2
        assert stub.seen[-1][2]["stream_options"] == {"include_usage": True}
        again = await fake.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert again.status_code == 429
        assert len(stub.seen) == 1


@in_loop
async def test_answers_have_a_largest_size(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.server.providers.relay.LONGEST_EVENT", 1000)
    stub.answer = lambda handler, body: stream(handler, b"data: " + b"x" * 5000)
    async with faked(**settings(stub)) as fake:
        answer = await fake.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert "far sent an event that is too long" in answer.text
        provider = fake.state.providers.all["far"]
        stub.models = {"data": [{"id": "x\n"}, {"id": 3}, "y", {"id": "good"}]}
        assert [row["id"] for row in await provider.models()] == ["far/good"]


def test_herd_is_a_provider_of_herd(live: Live) -> None:
    far = ProviderSpec(name="far", url=live.url)
    for near in serving(ServerSettings(providers=(far,), port=0, any_model=True)):
        client = openai.OpenAI(base_url=f"{near.url}/v1", api_key="none", max_retries=0)
        assert "far/nano" in [row.id for row in client.models.list()]
        given: dict[str, Any] = {"prompt": "Once upon", "max_tokens": 8, "temperature": 0}
        direct = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none").completions.create(model="nano", **given)
        assert client.completions.create(model="far/nano", **given).choices[0].text == direct.choices[0].text
        parts = client.completions.create(model="far/nano", stream=True, **given)
        assert "".join(part.choices[0].text for part in parts) == direct.choices[0].text
        assert len(client.embeddings.create(model="far/nano", input="x").data[0].embedding) > 10
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="far/nano", prompt="x", temperature=-1)
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.completions.create(model="far/none", prompt="x")


def from_flags(*args: str) -> ServerSettings:
    context = command.make_context("serve", list(args))
    return settings_from(context.params.pop("models"), context.params)


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_flags("nano").providers == (), "off by default"
    monkeypatch.setenv("FAR_KEY", KEY)
    given = from_flags(
        "nano", "--provider", "far=https://h.example/", "--provider", "a-b=http://localhost:1/api/v9/",
        "--provider-key-env", "far=FAR_KEY",
    )  # fmt: skip
    assert [(one.url, one.variable) for one in given.providers] == [
        ("https://h.example/v1", "FAR_KEY"),
        ("http://localhost:1/api/v9", "HERD_PROVIDER_A_B_KEY"),
    ]
    assert KEY not in repr(given), "keys are no part of settings"
    with pytest.raises(ConfigError, match="copies"):
        check_replicas(given)
    for args, said in (
        (("--provider-key-env", "x=FAR_KEY"), "no provider"),
        (("--provider", "far"), "NAME=URL"),
        (("--provider", "far=http://h", "--provider-key-env", "far=NOT_SET"), "NOT_SET is not set"),
        (("--provider", "far=http://h", "--provider", "far=http://i"), "two providers"),
        (("--provider", "a-b=http://h", "--provider", "a_b=http://i"), "both get the key"),
        (("--served-model-name", "far/x", "--provider", "far=http://h"), "cannot be called 'far/x'"),
        *((("--provider", f"far={url}"), "provider far") for url in ("h", "ftp://h", "http://u:p@h", "http://h?k=1")),
        (("--provider", "a/b=http://h"), "cannot be called"),
    ):
        with pytest.raises((click.UsageError, ConfigError), match=said):
            from_flags("nano", *args)
    monkeypatch.setenv("FAR_KEY", "two words")
    with pytest.raises(ConfigError, match="FAR_KEY holds no key"):
        from_flags("nano", "--provider", "far=http://h", "--provider-key-env", "far=FAR_KEY")
