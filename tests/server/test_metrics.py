"""What is counted: metrics and the dashboard that reads them, rates, and the reply cache."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from herd.server.errors import ApiError
from herd.server.metrics import ALIASES
from herd.server.process import WorkerError
from herd.server.protocol import Began, Piece, ToolPiece
from herd.server.rates import Rates
from tests.server.conftest import Fake, faked
from tests.server.fakes import saying

URL = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
ROOT = Path(__file__).parents[2]
STATS = {"running": 2, "waiting": 1, "blocks_total": 40, "blocks_used": 10, "blocks_cached": 5, "steps": 7, "requests": 3,
         "errors": 0, "preemptions": 1, "prompt_tokens": 100, "cached_tokens": 25, "generated_tokens": 9,
         "busy_seconds": 0.5, "tokens_per_second": 1.0}  # fmt: skip


async def read(fake: Fake) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by name and labels, read by Prometheus' own parser."""
    reply = await fake.client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.text))
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def of(samples: dict[Any, float], name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_what_is_counted() -> None:
    async def go() -> None:
        def script(call: Any) -> Any:
            if "fail" in str(call.prompt):
                return [Began("", 3), WorkerError("no", kind="Bug")]
            return saying("a", "b", reason="length")

        async with faked(script) as fake:
            for _ in range(2):
                await fake.client.post(URL, json=CHAT)
            await fake.client.post(URL, json={**CHAT, "messages": [{"role": "user", "content": "fail"}]})
            await fake.client.post(URL, json={})
            await fake.client.get("/invented/path/1")
            fake.model.stats = STATS
            found = await read(fake)
            model = {"model_name": "fake"}
            for prefix in ("herd_", "vllm:"):
                assert of(found, f"{prefix}prompt_tokens_total", **model) == 9
                assert of(found, f"{prefix}generation_tokens_total", **model) == 4
                assert of(found, f"{prefix}request_success_total", finished_reason="length", **model) == 2
                assert of(found, f"{prefix}time_to_first_token_seconds_count", **model) == 2
                assert of(found, f"{prefix}inter_token_latency_seconds_count", **model) == 2
                assert of(found, f"{prefix}e2e_request_latency_seconds_count", **model) == 2
                assert of(found, f"{prefix}request_prompt_tokens_bucket", le="4.0", **model) == 2
                assert of(found, f"{prefix}request_prompt_tokens_bucket", le="1.0", **model) == 0
                assert of(found, f"{prefix}request_decode_time_seconds_sum", **model) == pytest.approx(0.04)
                assert of(found, f"{prefix}num_requests_running", **model) == 2
                assert of(found, f"{prefix}num_requests_waiting", **model) == 1
                assert of(found, f"{prefix}kv_cache_usage_perc", **model) == 0.25
                assert of(found, f"{prefix}prefix_cache_queries_total", **model) == 100
                assert of(found, f"{prefix}prefix_cache_hits_total", **model) == 25
            assert of(found, "herd_request_failure_total", kind="Bug", **model) == 1
            assert of(found, "herd_model_ready", **model) == 1
            assert of(found, "http_requests_total", handler=URL, method="POST", status="200") == 2
            assert of(found, "http_requests_total", handler=URL, method="POST", status="400") == 1
            assert of(found, "http_requests_total", handler="other", method="GET", status="404") == 1

    asyncio.run(go())


def test_names_that_clients_invent_cost_no_memory() -> None:
    async def go() -> None:
        async with faked() as fake:
            await fake.client.post(URL, json=CHAT)
            before = len(await read(fake))
            for i in range(50):
                await fake.client.get(f"/nothing/{i}")
                await fake.client.get(f"/v1/models/none{i}")
                await fake.client.request(f"METHOD{i}", URL)
                await fake.client.post(URL, json={**CHAT, "model": f"none{i}"})
            assert len(await read(fake)) - before < 20

    asyncio.run(go())


def test_abandoned_replies_are_counted() -> None:
    async def go() -> None:
        async with faked(lambda call: [Began("", 3), Piece("", 0, "a"), 60.0]) as fake:
            with pytest.raises(httpx.TimeoutException):
                async with asyncio.timeout(5):
                    task = asyncio.create_task(fake.client.post(URL, json=CHAT))
                    await asyncio.sleep(0.2)
                    task.cancel()
                    raise httpx.ReadTimeout("gone")
            await asyncio.sleep(0.1)
            assert of(await read(fake), "herd_request_abandoned_total", model_name="fake") == 1

    asyncio.run(go())


def test_metrics_ask_for_the_key_unless_they_are_open() -> None:
    async def go() -> None:
        async with faked(api_keys=("k",)) as fake:
            assert (await fake.client.get("/metrics")).status_code == 401
        async with faked(api_keys=("k",), open_metrics=True) as fake:
            assert (await fake.client.get("/metrics")).status_code == 200

    asyncio.run(go())


def test_the_dashboard_and_the_page_name_metrics_that_exist() -> None:
    async def go() -> None:
        async with faked(reply_cache=1 << 20) as fake:
            await fake.client.post(URL, json={**CHAT, "temperature": 0})
            fake.model.stats = STATS
            text = (await fake.client.get("/metrics")).text
            families = list(text_string_to_metric_families(text))
        names = {one.name for family in families for one in family.samples} | {family.name for family in families}
        names |= {f"{family.name}_total" for family in families if family.type == "counter"}
        board = json.loads((ROOT / "docs/grafana/herd.json").read_text())
        queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
        queries += [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
        assert len(queries) > 12
        for query in queries:
            used = re.findall(r"\b(?:herd_|vllm:|http_|process_)\w+", query)
            assert used, query
            for name in used:
                assert name in names, (name, query)
        page = (ROOT / "docs/server/metrics.md").read_text()
        told = set(re.findall(r"`((?:herd_|vllm:)\w+)`", page))
        assert told <= names, told - names
        assert set(ALIASES.values()) <= {name.removesuffix("_total") for name in told}
        for family in families:
            if family.name.startswith("herd_"):
                assert re.search(rf"`{family.name}(_total)?`", page), f"{family.name} is not described"

    asyncio.run(go())


def test_buckets() -> None:
    rates = Rates(requests=60, tokens=None, at_once=None)
    for i in range(60):
        headers = rates.enter("a", now=0.0)
        assert headers["x-ratelimit-remaining-requests"] == str(59 - i)
        rates.leave("a")
    with pytest.raises(ApiError) as refused:
        rates.enter("a", now=0.0)
    assert (refused.value.status, refused.value.retry_after) == (429, 1.0)
    rates.enter("b", now=0.0)  # another account
    rates.enter("a", now=1.0)  # one a second comes back
    with pytest.raises(ApiError):
        rates.enter("a", now=1.5)


def test_tokens_are_paid_afterwards() -> None:
    rates = Rates(requests=None, tokens=600, at_once=None)
    rates.enter("a", now=0.0)
    rates.spend("a", 1000, now=0.0)
    with pytest.raises(ApiError) as refused:
        rates.enter("a", now=0.0)
    assert refused.value.retry_after == pytest.approx(40.1)
    rates.enter("a", now=41.0)


def test_requests_at_once() -> None:
    rates = Rates(requests=None, tokens=None, at_once=2)
    rates.enter("a")
    rates.enter("a")
    with pytest.raises(ApiError):
        rates.enter("a")
    rates.leave("a")
    rates.enter("a")


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many accounts are kept, fewer than usual."""
    monkeypatch.setattr("herd.server.rates.MOST_ACCOUNTS", 2000)
    return 2000


def test_accounts_do_not_pile_up(most: int) -> None:
    rates = Rates(requests=10, tokens=10, at_once=10)
    rates.enter("kept", now=0.0)  # still being answered
    for i in range(most + 50):
        rates.enter(f"{i}", now=0.0)
        rates.leave(f"{i}")
    assert len(rates._accounts) <= most
    assert rates._accounts["kept"].now == 1


def test_who_has_overdrawn_is_not_forgotten_for_others(most: int) -> None:
    """Who could make accounts (many addresses) had what was overdrawn full again."""
    rates = Rates(requests=None, tokens=60, at_once=None)
    rates.enter("debtor", now=0.0)
    rates.leave("debtor")
    rates.spend("debtor", 6000, now=0.0)
    for i in range(most + 200):
        rates.enter(f"{i}", now=0.0)
        rates.leave(f"{i}")
    assert len(rates._accounts) <= most
    with pytest.raises(ApiError, match="60 tokens a minute"):
        rates.enter("debtor", now=1.0)


def test_rates_of_keys() -> None:
    async def go() -> None:
        async with faked(api_keys=("one", "two"), rate_requests=3, rate_tokens=1000) as fake:
            first, second = {"x-api-key": "one"}, {"x-api-key": "two"}
            for left in (2, 1, 0):
                reply = await fake.client.post(URL, json=CHAT, headers=first)
                assert reply.status_code == 200
                assert reply.headers["x-ratelimit-remaining-requests"] == str(left)
            reply = await fake.client.post(URL, json=CHAT, headers=first)
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(reply.headers["retry-after"]) <= 20
            assert (await fake.client.get("/v1/models", headers=first)).status_code == 200
            reply = await fake.client.post(URL, json=CHAT, headers=second)
            assert reply.headers["x-ratelimit-remaining-tokens"] == "1000"
            reply = await fake.client.post(URL, json=CHAT, headers=second)
            assert int(reply.headers["x-ratelimit-remaining-tokens"]) in (995, 996)  # the first took 5
            found = (await fake.client.get("/metrics", headers=first)).text
            assert 'herd_requests_refused_total{limit="rate"} 1.0' in found

    asyncio.run(go())


GREEDY = {**CHAT, "temperature": 0}


def test_the_reply_cache_gives_the_same_again_and_says_so() -> None:
    tool = ToolPiece(0, "call_1", "f", "{}")

    async def go() -> None:
        async with faked(lambda call: [*saying("a", "é\n")[:2], Piece("", 0, tool=tool), *saying("b")[1:]],
                         reply_cache=1 << 20) as fake:  # fmt: skip
            first = await fake.client.post(URL, json=GREEDY)
            again = await fake.client.post(URL, json=GREEDY)
            assert (first.headers["x-herd-cache"], again.headers["x-herd-cache"]) == ("miss", "hit")
            assert len(fake.model.seen) == 1
            assert first.json()["choices"] == again.json()["choices"]
            assert first.json()["id"] != again.json()["id"]
            assert "from_cache" not in first.json()["usage"]
            assert again.json()["usage"]["from_cache"] is True
            assert again.json()["timings"]["predicted_ms"] == 0
            streamed = await fake.client.post(URL, json={**GREEDY, "stream": True})
            assert streamed.headers["x-herd-cache"] == "hit"
            assert streamed.text.endswith("data: [DONE]\n\n")
            found = await read(fake)
            lookups = {"model_name": "fake"}
            assert of(found, "herd_response_cache_lookups_total", outcome="hit", **lookups) == 2
            assert of(found, "herd_response_cache_lookups_total", outcome="miss", **lookups) == 1

    asyncio.run(go())


def test_everything_that_changes_the_answer_is_in_the_key() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    others: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hi "}]},
        {"messages": [{"role": "system", "content": "x"}, *CHAT["messages"]]},
        {"messages": [{"role": "system", "content": "hi"}]},
        {"max_tokens": 3}, {"stop": ["x"]}, {"top_k": 3}, {"n": 2}, {"logprobs": True}, {"seed": 1}, {"seed": 2},
        {"tools": tools}, {"tools": tools, "tool_choice": "required"}, {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 1}}, {"cache_salt": "x"}, {"truncation": "auto"}, {"add_generation_prompt": False},
        {"chat_template_kwargs": {"date": "1 May 2024"}}, {"presence_penalty": 1}, {"parallel_tool_calls": False},
    ]  # fmt: skip

    async def go() -> None:
        async with faked(lambda call: saying("a"), reply_cache=1 << 20) as fake:
            for number, other in enumerate([{}, *others], 1):
                n = other.get("n", 1)
                reply = await fake.client.post(URL, json={**GREEDY, **other})
                assert reply.headers["x-herd-cache"] == "miss", other
                assert len(fake.model.seen) == number, (other, n)
            for sampled in ({"temperature": 0.5}, {}, {"top_k": 5}, {"temperature": 0, "model": "a"}):
                reply = await fake.client.post(URL, json={**CHAT, **sampled})
                assert "x-herd-cache" not in reply.headers
            reply = await fake.client.post(URL, json={**CHAT, "seed": 5, "temperature": 0.5})
            assert reply.headers["x-herd-cache"] == "miss"

    asyncio.run(go())


@pytest.mark.parametrize(("shared", "seen"), [(False, "miss"), (True, "hit")])
def test_keys_share_replies_only_when_they_are_told_to(shared: bool, seen: str) -> None:
    async def go() -> None:
        settings: dict[str, Any] = {"reply_cache": 1 << 20, "api_keys": ("one", "two"), "reply_cache_shared": shared}
        async with faked(**settings) as fake:
            for key, outcome in (("one", "miss"), ("two", seen), ("one", "hit")):
                reply = await fake.client.post(URL, json=GREEDY, headers={"x-api-key": key})
                assert reply.headers["x-herd-cache"] == outcome
            # Cached prefixes are never shared by keys: the model sees a salt for each, which is not the key.
            plain = {**CHAT, "temperature": 1, "cache_salt": "s"}
            for key in ("one", "two"):
                await fake.client.post(URL, json=plain, headers={"x-api-key": key})
            salts = [call.salt for call in fake.model.seen[-2:]]
            assert salts[0] != salts[1]
            assert all(salt.endswith("/s") and "one" not in salt for salt in salts)

    asyncio.run(go())


def test_the_reply_cache_keeps_to_its_size_and_to_whole_replies() -> None:
    async def go() -> None:
        async with faked(lambda call: saying("x" * 1000), reply_cache=10_000) as fake:
            for i in range(50):
                await fake.client.post(URL, json={**GREEDY, "max_tokens": i + 1})
            replies = fake.state.counts.replies
            assert 0 < replies.used <= 10_000
            assert replies.used == sum(len(data) + 512 for data in replies._entries.values())
            assert (await fake.client.post(URL, json={**GREEDY, "max_tokens": 50})).headers["x-herd-cache"] == "hit"
            assert (await fake.client.post(URL, json={**GREEDY, "max_tokens": 1})).headers["x-herd-cache"] == "miss"
        failing = [Began("", 3), Piece("", 0, "a"), WorkerError("no", kind="Bug")]
        async with faked(lambda call: failing, reply_cache=10_000) as fake:
            for _ in range(2):
                assert (await fake.client.post(URL, json=GREEDY)).status_code == 500
            assert len(fake.model.seen) == 2

    asyncio.run(go())
