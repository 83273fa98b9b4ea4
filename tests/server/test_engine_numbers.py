"""`/v1/engine`."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.server.conftest import Live, faked
from tests.server.fakes import saying


def test_a_model_that_is_not_loaded() -> None:
    async def run() -> Any:
        async with faked() as fake:
            told = (await fake.client.get("/v1/engine")).json()
            assert not fake.made, "looking loads nothing"
            return told

    told = asyncio.run(run())
    (model,) = told["models"]
    assert (model["name"], model["state"], model["adapters"]) == ("fake", "unloaded", ["a"])
    assert model["memory"] is model["stats"] is model["context"] is model["defaults"] is None
    assert model["requests"] == []
    assert told["draining"] is False
    assert told["uptime"] >= 0


def test_requests_that_run_are_told_without_what_they_say() -> None:
    async def run() -> httpx.Response:
        async with faked(lambda call: [*saying("a")[:2], 30]) as fake:
            body = {"model": "fake@a", "messages": [{"role": "user", "content": "my secret"}]}
            asking = asyncio.create_task(fake.client.post("/v1/chat/completions", json=body))
            while not fake.made or not fake.model.running:
                await asyncio.sleep(0.01)
            fake.model.stats = {"running": 1, "blocks_total": 8}
            got = await fake.client.get("/v1/engine")
            asking.cancel()
            await asyncio.wait([asking])
            return got

    got = asyncio.run(run())
    (model,) = got.json()["models"]
    assert model["state"] == "ready"
    assert model["memory"] == 1 << 20
    assert model["stats"] == {"running": 1, "blocks_total": 8}
    assert len(model["requests"]) == 1
    assert 0 <= model["requests"][0] < 30
    assert "secret" not in got.text


def test_a_live_engine(live: Live) -> None:
    with live.client() as client:
        client.post("/v1/completions", json={"model": "nano", "prompt": "Once", "max_tokens": 4}).raise_for_status()
        told = client.get("/v1/engine").json()
    model = next(one for one in told["models"] if one["name"] == "nano")
    assert model["aliases"] == ["herd-nano"]
    assert model["memory"] > 50 << 20, "a process with torch in it"
    assert model["parameters"] > 1_000_000
    assert 0 <= model["defaults"]["temperature"] <= 2
    assert set(model["defaults"]) == {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"}
