"""Batches as clients make them, over models that say what they are told to."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from typing import Any

import httpx
import openai

from tests.server.conftest import Fake

SECONDS = 60.0
"""A worker has to start; a busy machine takes a while."""
CHAT = "/v1/chat/completions"


def line(id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"model": "fake", "messages": [{"role": "user", "content": id}]} | body
    return {"custom_id": id, "method": "POST", "url": url, "body": asked}


def jsonl(*lines: Any) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def ended(client: openai.OpenAI, id: str) -> Any:
    until = time.monotonic() + SECONDS
    while (batch := client.batches.retrieve(id)).status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < until, batch
        time.sleep(0.05)
    return batch


async def uploaded(fake: Fake, data: bytes, **fields: str) -> httpx.Response:
    fields = {"purpose": "batch"} | fields
    return await fake.client.post("/v1/files", files={"file": ("in.jsonl", data)}, data=fields)


async def begun(fake: Fake, *lines: Any, endpoint: str = CHAT) -> str:
    file = (await uploaded(fake, jsonl(*lines))).json()["id"]
    asked = {"input_file_id": file, "endpoint": endpoint, "completion_window": "24h"}
    answer = await fake.client.post("/v1/batches", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def over(fake: Fake, id: str) -> dict[str, Any]:
    late = time.monotonic() + SECONDS
    while time.monotonic() < late:
        batch = (await fake.client.get(f"/v1/batches/{id}")).json()
        if batch["status"] in ("completed", "failed", "cancelled", "expired"):
            return batch
        await asyncio.sleep(0.01)
    raise AssertionError(batch)


async def lines_of(fake: Fake, file: str) -> list[dict[str, Any]]:
    return [json.loads(one) for one in (await fake.client.get(f"/v1/files/{file}/content")).text.splitlines()]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def until(fake: Fake, id: str, key: str, value: Any) -> None:
    late = time.monotonic() + SECONDS
    while time.monotonic() < late:
        if (await fake.client.get(f"/v1/batches/{id}")).json()[key] == value:
            return
        await asyncio.sleep(0.01)
    raise AssertionError((await fake.client.get(f"/v1/batches/{id}")).json())
