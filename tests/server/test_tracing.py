"""Spans as OpenTelemetry's own SDK records and sends them: names, the caller's trace, and nothing of what was asked."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from herd.errors import ConfigError
from herd.server.process import WorkerError
from herd.server.protocol import Began, Piece
from herd.server.providers.spec import ProviderSpec
from herd.server.settings import ModelSpec, ServerSettings
from herd.server.tracing import ENDPOINTS, Tracing, tracing_for, wanted
from tests.server.conftest import Fake, faked, serving
from tests.server.fakes import Scripted, saying

WHY = "OpenTelemetry is not installed (herd[otel])"
sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=WHY)
pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason=WHY)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, server_attributes  # noqa: E402
from opentelemetry.semconv.attributes import error_attributes  # noqa: E402
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

URL = "/v1/chat/completions"
SECRET = "the secret recipe"
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": SECRET}]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OURS = {"herd.request.id", "herd.response.from_cache"}
ATTRIBUTES = OURS | {
    value
    for module in (gen_ai_attributes, server_attributes, error_attributes)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str)
}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINTS, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)


@contextlib.asynccontextmanager
async def traced(
    script: Callable[..., Any] = lambda call: saying("Hello", " there"), **settings: Any
) -> AsyncIterator[tuple[Fake, InMemorySpanExporter]]:
    """An application whose spans are kept in memory."""
    kept, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    async with faked(script, **settings) as fake:
        assert fake.state.counts.tracing is None, "nobody asked for spans"
        fake.state.counts.tracing = Tracing(provider, "127.0.0.1", 8000)
        yield fake, kept


def only(kept: InMemorySpanExporter) -> ReadableSpan:
    """The one span, which has no names of its own making and no text."""
    [span] = kept.get_finished_spans()
    assert set(span.attributes or {}) <= ATTRIBUTES
    assert SECRET not in span.to_json()
    assert "Hello" not in span.to_json()
    return span


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_relayed_requests_have_spans(streams: bool, fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A herd behind a herd: the span has the provider, the counts and the caller's trace, and an error only its kind."""

    def said(call: Any) -> Any:
        return (
            [Began("", 3), Piece("", 0, "Hel"), WorkerError(SECRET, kind="Crashed")] if fails else saying("Hel", "lo")
        )

    behind = ServerSettings(models=(ModelSpec(source="fake", name="fake"),), port=0, lazy=True)
    for far in serving(behind, launch=lambda spec: Scripted(spec, said)):

        async def go(url: str = far.url) -> None:
            provider = ProviderSpec(name="far", url=f"{url}/v1")
            async with traced(providers=(provider,)) as (fake, kept):
                ask = {**CHAT, "model": "far/fake", "stream": streams, "temperature": 0.5, "max_tokens": 7}
                if streams:
                    ask["stream_options"] = {"include_usage": True}
                head = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
                answer = await fake.client.post(URL, json=ask, headers=head)
                assert answer.status_code == (503 if fails and not streams else 200)
                span = kept.get_finished_spans()[0]
                told = dict(span.attributes or {})
                assert (span.name, f"{span.context.trace_id:032x}") == ("chat far/fake", TRACE)
                assert told["gen_ai.provider.name"] == "far"
                assert (told["gen_ai.request.temperature"], told["gen_ai.request.max_tokens"]) == (0.5, 7)
                assert told.get("error.type") == (
                    "Status503" if fails and not streams else "Status502" if fails else None
                )
                assert (span.status.status_code is StatusCode.ERROR) == fails
                if not fails:
                    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 2)
                    assert told["gen_ai.response.finish_reasons"] == ("stop",)
                assert ("gen_ai.response.time_to_first_chunk" in told) == streams
                assert not any(SECRET in str(value) for value in told.values())
                assert set(told) <= ATTRIBUTES

        with caplog.at_level("WARNING", "herd.server"):
            asyncio.run(go())
    assert ("provider far" in caplog.text) == fails


def test_a_span_says_what_the_conventions_ask_for() -> None:
    async def go() -> None:
        async with traced(lambda call: saying("Hello", " there", reason="length")) as (fake, kept):
            body = {**CHAT, "max_tokens": 9, "temperature": 0.5, "top_p": 0.75, "seed": 3, "stop": [SECRET]}
            reply = await fake.client.post(f"http://localhost:8123{URL}", json=body)
            assert reply.status_code == 200
            span = only(kept)
            assert (span.name, span.kind, span.parent) == ("chat fake", SpanKind.SERVER, None)
            found = dict(span.attributes or {})
            assert 0 <= found.pop("gen_ai.response.time_to_first_chunk") < 60
            assert found == {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "herd",
                "gen_ai.request.model": "fake",
                "gen_ai.response.model": "fake",
                "gen_ai.request.max_tokens": 9,
                "gen_ai.request.temperature": 0.5,
                "gen_ai.request.top_p": 0.75,
                "gen_ai.request.seed": 3,
                "gen_ai.usage.input_tokens": 3,
                "gen_ai.usage.output_tokens": 2,
                "gen_ai.usage.cache_read.input_tokens": 1,
                "gen_ai.response.finish_reasons": ("length",),
                "server.address": "localhost",
                "server.port": 8123,
                "herd.request.id": reply.headers["x-request-id"],
                "herd.response.from_cache": False,
            }
            assert span.status.status_code == StatusCode.UNSET
            assert span.start_time is not None
            assert span.end_time is not None
            assert 0 < span.end_time - span.start_time < 60e9

    asyncio.run(go())


@pytest.mark.parametrize(
    ("header", "taken"),
    [(f"00-{TRACE}-{PARENT}-01", True), (f"00-{'0' * 32}-{PARENT}-01", False), ("nonsense\x7f", False), ("", False)],
)
def test_the_trace_of_the_caller_goes_on(header: str, taken: bool) -> None:
    async def go() -> None:
        async with traced() as (fake, kept):
            headers = {"traceparent": header, "tracestate": "vendor=1"}
            reply = await fake.client.post("/v1/completions", json={"model": "fake", "prompt": SECRET}, headers=headers)
            assert reply.status_code == 200
            span = only(kept)
            assert span.name == "text_completion fake"
            if not taken:
                assert span.parent is None
                return
            assert span.parent is not None
            assert span.context is not None
            assert f"{span.context.trace_id:032x}" == TRACE
            assert f"{span.parent.span_id:016x}" == PARENT
            assert span.context.trace_state.get("vendor") == "1"

    asyncio.run(go())


def test_errors_are_said_by_kind_and_repeat_nothing() -> None:
    async def go() -> None:
        async with traced(lambda call: [Began("", 3), WorkerError(f"no: {SECRET}", kind="Bug")]) as (fake, kept):
            await fake.client.post(URL, json=CHAT)
            span = only(kept)
            assert (span.attributes or {})["error.type"] == "Bug"
            assert span.status.status_code == StatusCode.ERROR
            assert not span.events, "no exception with its text"

    asyncio.run(go())


def test_a_client_that_goes_away_ends_its_span() -> None:
    async def go() -> None:
        async with traced(lambda call: [Began("", 3), Piece("", 0, "Hello"), 30.0]) as (fake, kept):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await fake.client.post(URL, json=CHAT)
            assert (only(kept).attributes or {})["error.type"] == "abandoned"
            assert fake.model.running == 0

    asyncio.run(go())


def test_replies_of_the_cache_have_spans_too() -> None:
    async def go() -> None:
        async with traced(reply_cache=1 << 20) as (fake, kept):
            for _ in range(2):
                await fake.client.post(URL, json={**CHAT, "temperature": 0})
            assert [(one.attributes or {})["herd.response.from_cache"] for one in kept.get_finished_spans()] == [
                False,
                True,
            ]

    asyncio.run(go())


def test_when_spans_are_wanted() -> None:
    plain, asked = ServerSettings(), ServerSettings(otel=True)
    here = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert not wanted(plain, {})
    assert wanted(asked, {})
    assert wanted(plain, here)
    assert wanted(plain, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"})
    assert not wanted(asked, here | {"OTEL_SDK_DISABLED": "true"})
    assert not wanted(asked, here | {"OTEL_TRACES_EXPORTER": "none"})
    assert tracing_for(plain, {}) is None
    with pytest.raises(ConfigError, match=r"'grpc'.*http/protobuf"):
        tracing_for(asked, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    with pytest.raises(ConfigError, match="'zipkin'"):
        tracing_for(asked, {"OTEL_TRACES_EXPORTER": "zipkin"})


@pytest.mark.parametrize(("settings", "environment", "why"), [
    (ServerSettings(otel=True), {}, "--otel"),
    (ServerSettings(), {ENDPOINTS[1]: "http://127.0.0.1:1"}, ENDPOINTS[1]),
])  # fmt: skip
def test_what_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, settings: ServerSettings, environment: dict[str, str], why: str
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=rf"{why} asks for spans.*pip install 'herd\[otel\]'"):
        tracing_for(settings, environment)


def test_a_collector_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: OTLP over HTTP to a server of the standard library, read by OpenTelemetry's own messages."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")

        async def go() -> None:
            async with faked() as fake:
                await fake.client.post(URL, json=CHAT)

        try:
            asyncio.run(go())
        finally:
            collector.shutdown()
            thread.join()
    [(path, data)] = got
    assert path == "/v1/traces"
    assert SECRET.encode() not in data
    [resource] = ExportTraceServiceRequest.FromString(data).resource_spans
    assert {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"] == "herd"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["chat fake"]
