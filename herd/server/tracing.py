"""Spans for OpenTelemetry: one for each reply, with the names of the GenAI conventions, never what was asked or said. No torch.

Source: OpenTelemetry's semantic conventions for generative AI, "Inference" spans (attributes gen_ai.*), and W3C Trace Context.
The SDK is an extra (herd[otel]) and is imported when tracing is on. Where spans go, how many are kept and what the server is
called there are the SDK's own variables: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME and others.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from herd import __version__
from herd.errors import ConfigError
from herd.server.caller import caller
from herd.server.protocol import Began, Call, Chat, Ended, Event, Finished, Piece

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from herd.server.settings import ServerSettings

__all__ = ["Tracing", "tracing_for", "wanted"]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SPOKEN = "http/protobuf"
ABANDONED = "abandoned"
"""error.type of a reply whose client went away."""
SAMPLING = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "n": "gen_ai.request.choice.count",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
}
"""Fields of a call's sampling -> attributes. Stop sequences are missing: they are text of the client's."""


def wanted(settings: ServerSettings, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether spans are asked for: by `--otel` or an endpoint in the environment, which can also forbid them."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return False
    return settings.otel or any(environment.get(name) for name in ENDPOINTS)


def tracing_for(settings: ServerSettings, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Spans to the collector that the environment names (http://localhost:4318 without one); None when nobody wants them.

    Raises ConfigError when they are wanted and the packages are missing, or the environment asks for another protocol.
    """
    if not wanted(settings, environment):
        return None
    why = "--otel" if settings.otel else next(name for name in ENDPOINTS if environment.get(name))
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower()
    if exporter not in ("", "otlp"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER is {exporter!r}: herd sends spans by otlp, or none")
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), SPOKEN)
    if protocol != SPOKEN:
        raise ConfigError(
            f"the environment asks for OTLP over {protocol!r}, and herd speaks {SPOKEN}: set {PROTOCOLS[1]}"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            f"{why} asks for spans, and OpenTelemetry is not installed: pip install 'herd[otel]', or set OTEL_SDK_DISABLED=true"
        ) from None
    named: dict[str, Any] = {SERVICE_VERSION: __version__}
    if not environment.get("OTEL_SERVICE_NAME") and "service.name=" not in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        named[SERVICE_NAME] = "herd"
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider, settings.host, settings.port)


class Tracing:
    """Writes spans to `provider`. `host` and `port` are said where a request does not tell its own."""

    def __init__(self, provider: TracerProvider, host: str, port: int) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._host, self._port = provider, host, port
        self._tracer = provider.get_tracer("herd.server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Send what is left. It may take as long as the exporter waits for its collector: not for an event loop."""
        self._provider.shutdown()

    @contextlib.contextmanager
    def relayed(
        self, operation: str, name: str, provider: str, fields: Mapping[str, Any], arrived: float
    ) -> Iterator[dict[str, Any]]:
        """A span of the caller's trace for a request that `provider` answers, from `arrived` to the end inside. What is put into
        the dict becomes its attributes; without `error.type` it was a success."""
        from opentelemetry.trace import Status, StatusCode

        span = self._span(operation, name, provider, fields, arrived)
        found: dict[str, Any] = {"error.type": ABANDONED}
        try:
            yield found
        finally:
            if found.get("error.type") is None:
                found.pop("error.type", None)
            else:
                span.set_status(Status(StatusCode.ERROR))
            span.set_attributes(found)
            span.end()

    def _span(self, operation: str, name: str, provider: str, fields: Mapping[str, Any], arrived: float) -> Span:
        from opentelemetry.trace import SpanKind

        who = caller()
        host, port = who.server or (self._host, self._port)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": name,
            "server.address": host,
            "herd.request.id": who.request,
        }
        if port:
            attributes["server.port"] = port
        for field, attribute in SAMPLING.items():
            if isinstance(value := fields.get(field), int | float) and not isinstance(value, bool):
                attributes[attribute] = value
        return self._tracer.start_span(
            f"{operation} {name}",
            context=self._propagator.extract(who.trace),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=time.time_ns() - int((time.monotonic() - arrived) * 1e9),
        )

    async def watch(
        self, name: str, model: str, call: Call, events: AsyncGenerator[Event, None], arrived: float
    ) -> AsyncGenerator[Event, None]:
        """`events`, with a span of the caller's trace from `arrived` (by `time.monotonic`) to their end.

        `name` is what the client calls the model, `model` its own name.
        """
        from opentelemetry.trace import Status, StatusCode

        operation = "chat" if isinstance(call.prompt, Chat) else "text_completion"
        span = self._span(operation, name, "herd", call.sampling, arrived)
        span.set_attribute("gen_ai.response.model", model)
        reasons: dict[int, str] = {}
        begun = over = False
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, Began):
                        span.set_attribute("gen_ai.usage.input_tokens", event.prompt_tokens)
                    elif isinstance(event, Piece) and not begun:
                        begun = True
                        span.set_attribute("gen_ai.response.time_to_first_chunk", time.monotonic() - arrived)
                    elif isinstance(event, Ended):
                        reasons[event.index] = event.reason
                    elif isinstance(event, Finished):
                        over = True
                        usage = event.usage
                        span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
                        span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
                        span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
                        span.set_attribute("herd.response.from_cache", usage.from_cache)
                    yield event
        except BaseException as error:
            if not over:  # messages of errors may repeat what was asked: the kind is all that is said
                kind = getattr(error, "kind", type(error).__name__) if isinstance(error, Exception) else ABANDONED
                span.set_attribute("error.type", kind)
                span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            if reasons:
                span.set_attribute("gen_ai.response.finish_reasons", [reasons[index] for index in sorted(reasons)])
            span.end()
