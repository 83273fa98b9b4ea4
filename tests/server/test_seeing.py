"""Images of chats over HTTP: a model that reads text refuses them untouched, one that sees gets what was let in."""

from __future__ import annotations

import asyncio
import base64
import random
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import openai
import pytest

from herd.cli.serve import command, settings_from
from herd.server.errors import ApiError
from herd.server.fetching import Fetcher
from herd.server.settings import ModelSpec, ServerSettings
from tests.server import fakes
from tests.server.conftest import Fake, faked, serving
from tests.server.fakes import Scripted, saying
from tests.server.health import held_to_the_bar

PATH = "/v1/chat/completions"


def png(width: int, height: int, noise: bytes = b"") -> bytes:
    """A PNG of so many black pixels, or of noise."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", noise or zlib.compress(bytes((width + 1) * height)))
        + chunk(b"IEND", b"")
    )


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


SMALL = url(png(4, 3))
BOMB = url(png(9, 9).replace(struct.pack(">II", 9, 9), struct.pack(">II", 60_000, 60_000)))


def body(*urls: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": "What is this?"},
        *({"type": "image_url", "image_url": one if isinstance(one, dict) else {"url": one}} for one in urls),
    ]
    return {"model": "fake", "messages": [{"role": role, "content": parts}], **more}


@asynccontextmanager
async def seeing(**settings: Any) -> AsyncIterator[Fake]:
    """An application whose model sees."""
    with patch.object(fakes, "ABOUT", replace(fakes.ABOUT, sees=True)):
        async with faked(**settings) as fake:
            yield fake


class Nowhere(Fetcher):
    """Says what was asked for, and gives it."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data, self.asked = data, []

    async def fetch(self, url: str, most: int, took: Any = None) -> bytes:
        self.asked.append((url, most))
        took(len(self.data))
        if len(self.data) > most:
            raise ApiError(400, "is too large", code="image_not_fetched")
        return self.data


def test_a_model_that_reads_text_refuses_before_anything_is_fetched() -> None:
    async def run() -> None:
        async with faked(fetch_images=True) as fake:
            fake.state.fetcher = Nowhere(png(2, 2))
            for one in ("https://example.org/a.png", SMALL, "data:image/png;base64,####"):
                reply = await fake.client.post(PATH, json=body(one))
                error = reply.json()["error"]
                assert (reply.status_code, error["param"], error["code"]) == (
                    400,
                    "messages[0].content[1]",
                    "unsupported_content",
                )
                assert "reads text only" in error["message"]
            assert fake.state.fetcher.asked == []
            assert fake.model.seen == []

    asyncio.run(run())


def test_a_model_that_sees_gets_them_in_their_places() -> None:
    async def run() -> None:
        async with seeing() as fake:
            async with openai.AsyncOpenAI(
                base_url="http://localhost/v1", api_key="none", http_client=fake.client
            ) as client:
                answer = await client.chat.completions.create(**body(SMALL, {"url": SMALL, "detail": "auto"}))  # type: ignore[call-overload]
            assert answer.choices[0].message.content == "Hello there"
            content = fake.model.seen[0].prompt.messages[0]["content"]  # type: ignore[union-attr]
            assert content == [
                {"type": "text", "text": "What is this?"},
                *[{"type": "image_url", "image_url": {"url": SMALL}}] * 2,
            ]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        (body("https://example.org/a.png"), "messages[0].content[1]", "--fetch-images"),
        (body(SMALL, "file:///etc/passwd"), "messages[0].content[2]", "opens no addresses"),
        (body("/etc/passwd"), "messages[0].content[1]", "opens no addresses"),
        (body({"url": SMALL, "detail": "high"}), "messages[0].content[1].image_url.detail", "leave it out"),
        (body(SMALL, role="system"), "messages[0].content[1]", "only user messages"),
        (body(*[SMALL] * 17), "messages[0].content[17]", "16 are all that may be"),
        (body(BOMB), "messages[0].content[1]", "pixels"),
    ],
)  # fmt: skip
def test_what_is_refused(asked: dict[str, Any], param: str, words: str) -> None:
    async def run() -> None:
        async with seeing() as fake:
            reply = await fake.client.post(PATH, json=asked)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, param), error
            assert words in error["message"]
            assert not [call for made in fake.made for call in made.seen]

    asyncio.run(run())


def test_addresses_are_opened_when_the_server_was_told_to() -> None:
    async def run() -> None:
        async with seeing(fetch_images=True, max_body=4 << 20, max_bodies=4 << 20) as fake:
            assert isinstance(fake.state.fetcher, Fetcher)
            fake.state.fetcher = there = Nowhere(png(5, 5))
            reply = await fake.client.post(PATH, json=body("https://example.org/a", SMALL, "https://example.org/b"))
            assert reply.status_code == 200, reply.text
            content = fake.model.seen[0].prompt.messages[0]["content"]  # type: ignore[union-attr]
            urls = [part["image_url"]["url"] for part in content[1:]]
            assert urls[1] == SMALL
            assert urls[0] == urls[2] == "data:image/png;base64," + base64.b64encode(there.data).decode()
            assert there.asked[0][1] - there.asked[1][1] == len(there.data), "all of a request together are bounded"
            assert fake.state.counts.bodies == 0, "what was held is given back"
            there.data = bytes(5 << 20)
            reply = await fake.client.post(PATH, json=body("https://example.org/a"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "server_busy")
            assert "Retry-After" in reply.headers
            assert fake.state.counts.bodies == 0

    asyncio.run(run())
    context = command.make_context("serve", ["nano", "--fetch-images"])
    assert settings_from(context.params.pop("models"), context.params).fetch_images
    assert not ServerSettings().fetch_images


def test_without_the_flag_nothing_could_be_fetched() -> None:
    async def run() -> None:
        async with seeing() as fake:
            assert fake.state.fetcher is None

    asyncio.run(run())


ASKED = 200


def test_health_answers_beside_images_of_20_megapixels() -> None:
    """12 MB of noise that nothing can compress, again and again, from two clients."""
    noise = random.Random(3).randbytes(11_500_000)
    settings = ServerSettings(models=(ModelSpec(source="fake", name="fake"),), port=0, lazy=True, drain_seconds=0.5)
    asked = body("data:image/png;base64," + base64.b64encode(png(5000, 4000, noise)).decode())
    with patch.object(fakes, "ABOUT", replace(fakes.ABOUT, sees=True)):
        for live in serving(settings, launch=lambda spec: Scripted(spec, lambda call: saying("A field."))):
            works = [lambda client: client.post(PATH, json=asked).status_code] * 2
            assert held_to_the_bar(live, works, asked=ASKED, answered=4) == {200}
