"""What Prometheus reads at `/metrics`: herd's own names, and the same numbers under vLLM's for dashboards that exist. No torch.

Gauges and the engine's counters are read when somebody asks; everything else is counted in `State.run`, through which every
reply of every API goes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from herd import __version__
from herd.server.caller import caller
from herd.server.protocol import Began, Ended, Event, Finished, Piece

if TYPE_CHECKING:
    from herd.server.state import State

__all__ = ["ALIASES", "Metrics", "router"]

router = APIRouter(tags=["server"])

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
"""Upper bounds of histograms: counts of tokens, and seconds."""

ALIASES = {
    "herd_num_requests_running": "vllm:num_requests_running",
    "herd_num_requests_waiting": "vllm:num_requests_waiting",
    "herd_kv_cache_usage_perc": "vllm:kv_cache_usage_perc",
    "herd_prefix_cache_queries": "vllm:prefix_cache_queries",
    "herd_prefix_cache_hits": "vllm:prefix_cache_hits",
    "herd_num_preemptions": "vllm:num_preemptions",
    "herd_prompt_tokens": "vllm:prompt_tokens",
    "herd_generation_tokens": "vllm:generation_tokens",
    "herd_request_success": "vllm:request_success",
    "herd_request_prompt_tokens": "vllm:request_prompt_tokens",
    "herd_request_generation_tokens": "vllm:request_generation_tokens",
    "herd_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "herd_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "herd_request_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "herd_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "herd_request_prefill_time_seconds": "vllm:request_prefill_time_seconds",
    "herd_request_decode_time_seconds": "vllm:request_decode_time_seconds",
}
"""Our metric families -> vLLM's names of the same numbers."""
MODEL = ("model_name",)
REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")
"""How a provider's reply may end; others are counted as "other"."""


class Metrics:
    """The counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # when each count was first seen: a third of the text, read by nobody
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._http = Counter(
            "http_requests_total", "Requests by route and status.", ("handler", "method", "status"), registry=registry
        )
        self._refused = Counter("herd_requests_refused", "Requests refused by a limit.", ("limit",), registry=registry)
        self._prompt = Counter("herd_prompt_tokens", "Tokens of prompts.", MODEL, registry=registry)
        self._made = Counter("herd_generation_tokens", "Tokens that were generated.", MODEL, registry=registry)
        self._success = Counter(
            "herd_request_success", "Replies that were completed.", ("model_name", "finished_reason"), registry=registry
        )
        self._failed = Counter(
            "herd_request_failure", "Replies that ended with an error.", ("model_name", "kind"), registry=registry
        )
        self._left = Counter("herd_request_abandoned", "Replies whose client went away.", MODEL, registry=registry)
        self._cache = Counter(
            "herd_response_cache_lookups",
            "Lookups of the response cache.",
            ("model_name", "outcome"),
            registry=registry,
        )
        self._of_prompt = _histogram(registry, "herd_request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._of_reply = _histogram(registry, "herd_request_generation_tokens", "Tokens of a reply.", TOKENS)
        self._first = _histogram(registry, "herd_time_to_first_token_seconds", "From arrival to the first text.", FIRST)
        self._between = _histogram(
            registry,
            "herd_inter_token_latency_seconds",
            "Between two pieces of a reply, a token each as a rule.",
            BETWEEN,
        )
        self._per_token = _histogram(
            registry, "herd_request_time_per_output_token_seconds", "Mean of a reply after its first token.", BETWEEN
        )
        self._whole = _histogram(registry, "herd_e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self._prefill = _histogram(
            registry,
            "herd_request_prefill_time_seconds",
            "From when the model's process took the request to its first token: waiting counts.",
            WHOLE,
        )
        self._decode = _histogram(registry, "herd_request_decode_time_seconds", "From first token to last.", WHOLE)

    def serve(self, state: State) -> None:
        """Read the gauges of `state`, and give everything under vLLM's names, too."""
        self.registry.register(_Gauges(state))

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(_Renamed(self.registry))  # type: ignore[arg-type]

    def http(self, handler: str, method: str, status: int) -> None:
        """A request was answered."""
        known = method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
        self._http.labels(handler, known, str(status)).inc()

    def refused(self, limit: str) -> None:
        """A request was refused: limit is "rate", "queue" or "bodies"."""
        self._refused.labels(limit).inc()

    def cache(self, model: str, outcome: str) -> None:
        """The response cache was asked: hit, miss or unfit (not deterministic)."""
        self._cache.labels(model, outcome).inc()

    async def watch(
        self, model: str, events: AsyncGenerator[Event, None], arrived: float
    ) -> AsyncGenerator[Event, None]:
        """`events`, counted for `model`: the slot's own name, since every name costs memory here. `arrived` is by
        `time.monotonic`."""
        last: dict[int, float] = {}
        between = self._between.labels(model)
        over = False
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, Piece):
                        now = time.monotonic()
                        if event.index in last:
                            between.observe(now - last[event.index])
                        elif not last:
                            self._first.labels(model).observe(now - arrived)
                        last[event.index] = now
                    elif isinstance(event, Ended):
                        self._success.labels(model, event.reason).inc()
                    elif isinstance(event, Finished):
                        over = True
                        self._finished(model, event, time.monotonic() - arrived)
                    elif isinstance(event, Began):
                        self._prompt.labels(model).inc(event.prompt_tokens)
                        caller().prompt_tokens += event.prompt_tokens
                    yield event
        except (GeneratorExit, BaseException) as error:
            if not over:
                if isinstance(error, Exception):
                    self._failed.labels(model, getattr(error, "kind", type(error).__name__)).inc()
                else:
                    self._left.labels(model).inc()
            raise

    def remote(
        self, model: str, prompt: int, made: int, reasons: Sequence[str], seconds: float, first: float | None
    ) -> None:
        """A provider has answered: tokens of the prompt and the reply, how choices ended, and times since it was asked."""
        self._prompt.labels(model).inc(prompt)
        self._made.labels(model).inc(made)
        self._of_prompt.labels(model).observe(prompt)
        self._of_reply.labels(model).observe(made)
        self._whole.labels(model).observe(seconds)
        if first is not None:
            self._first.labels(model).observe(first)
        for reason in reasons or ("stop",):
            self._success.labels(model, reason if reason in REASONS else "other").inc()

    def remote_failed(self, model: str, kind: str) -> None:
        """A provider's answer is an error."""
        self._failed.labels(model, kind).inc()

    def remote_left(self, model: str) -> None:
        """The client went away before a provider had answered."""
        self._left.labels(model).inc()

    def _finished(self, model: str, event: Finished, seconds: float) -> None:
        usage = event.usage
        self._made.labels(model).inc(usage.completion_tokens)
        caller().generated_tokens += usage.completion_tokens
        self._of_prompt.labels(model).observe(usage.prompt_tokens)
        self._of_reply.labels(model).observe(usage.completion_tokens)
        self._whole.labels(model).observe(seconds)
        self._prefill.labels(model).observe(usage.prompt_seconds)
        self._decode.labels(model).observe(usage.decode_seconds)
        if usage.completion_tokens > 1:
            self._per_token.labels(model).observe(usage.decode_seconds / (usage.completion_tokens - 1))


def _histogram(registry: CollectorRegistry, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, about, MODEL, buckets=buckets, registry=registry)


class _Gauges(Collector):
    """What models do now, from the beats of their processes."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client's."""
        state = self._state
        info = GaugeMetricFamily("herd_info", "The version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield GaugeMetricFamily("herd_draining", "1 while the server shuts down.", value=float(state.draining))
        yield GaugeMetricFamily(
            "herd_connections_late",
            "Connections that were ended because a deadline had passed.",
            value=state.counts.late(),
        )
        gauges = {
            "herd_model_ready": "1 when the model is loaded.",
            "herd_model_memory_bytes": "Memory of the model's process, measured.",
            "herd_num_requests_running": "Replies that grow now.",
            "herd_num_requests_waiting": "Requests that wait for the model.",
            "herd_kv_cache_usage_perc": "Part of the KV blocks that replies hold; 1 is all.",
            "herd_kv_blocks": "Blocks of the KV cache.",
            "herd_kv_blocks_used": "Those that replies hold.",
            "herd_kv_blocks_cached": "Those that remember what prompts began with, and may be taken.",
            "herd_kv_blocks_pinned": "Those that hold the virtual tokens of adapters.",
        }
        counters = {
            "herd_prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
            "herd_prefix_cache_hits": "Those that were found.",
            "herd_num_preemptions": "Replies that made room for others and were computed again.",
            "herd_engine_steps": "Steps of the engine.",
            "herd_engine_errors": "Requests that failed inside the engine.",
            "herd_engine_busy_seconds": "Time in which the engine computed.",
        }
        families: dict[str, Any] = {
            name: GaugeMetricFamily(name, about, labels=MODEL) for name, about in gauges.items()
        }
        families |= {name: CounterMetricFamily(name, about, labels=MODEL) for name, about in counters.items()}
        for slot in state.models.slots.values():
            for name, value in _numbers(slot).items():
                families[name].add_metric([slot.spec.name], value)
        yield from families.values()


def _numbers(slot: Any) -> dict[str, float]:
    """Everything that is known of a model."""
    out: dict[str, float] = {"herd_model_ready": float(slot.state == "ready")}
    if slot.process is None:
        return out
    memory = slot.process.memory()
    if memory is not None:
        out["herd_model_memory_bytes"] = memory
    stats = slot.process.stats
    if not stats:
        return out
    total = stats["blocks_total"]
    return out | {
        "herd_num_requests_running": stats["running"],
        "herd_num_requests_waiting": stats["waiting"],
        "herd_kv_cache_usage_perc": stats["blocks_used"] / total if total else 0.0,
        "herd_kv_blocks": total,
        "herd_kv_blocks_used": stats["blocks_used"],
        "herd_kv_blocks_cached": stats["blocks_cached"],
        "herd_kv_blocks_pinned": stats.get("blocks_pinned", 0),
        "herd_prefix_cache_queries": stats["prompt_tokens"],
        "herd_prefix_cache_hits": stats["cached_tokens"],
        "herd_num_preemptions": stats["preemptions"],
        "herd_engine_steps": stats["steps"],
        "herd_engine_errors": stats["errors"],
        "herd_engine_busy_seconds": stats["busy_seconds"],
    }


class _Renamed(Collector):
    """Every metric, and behind each that vLLM has, a copy under its name."""

    def __init__(self, inner: CollectorRegistry) -> None:
        self._inner = inner

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client's."""
        for metric in self._inner.collect():
            yield metric
            alias = ALIASES.get(metric.name)
            if alias is not None:
                copy = Metric(alias, metric.documentation, metric.type)
                copy.samples = [Sample(alias + one.name.removeprefix(metric.name), *one[1:]) for one in metric.samples]
                yield copy


@router.get("/metrics", summary="Counts and times for Prometheus, under herd's names and vLLM's")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(request.app.state.herd.counts.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
