"""One streamed request, byte by byte: the clock is read when bytes come, and little else is done between two of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from herd.errors import ConfigError

__all__ = ["Outcome", "Target", "get_json"]

LIMIT = 1 << 20
"""Longest line of an answer that is read."""
WORDS = 200
"""Characters of an error that are kept."""


@dataclass(slots=True)
class Outcome:
    """What came of a request. Times are of `time.perf_counter`; `due` is when it should have been sent.

    `stamps` are the arrivals of pieces of text; `tokens` counts them as the server does, or by pieces where it does not
    (`counted` is false then).
    """

    client: int
    due: float
    sent: float = 0.0
    ended: float = 0.0
    stamps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    counted: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A server: its address, and the key it wants. Raises ConfigError for an address that is none."""

    url: str
    key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not the address of a server: expected http://HOST:PORT")

    async def ask(self, outcome: Outcome, path: str, body: dict[str, Any], seconds: float) -> None:
        """Send a request and read its stream into `outcome`. Failures are written there, never raised."""
        outcome.sent = time.perf_counter()
        try:
            async with asyncio.timeout(seconds):
                await self._ask(outcome, path, body)
        except TimeoutError:
            outcome.error = f"no end after {seconds:g} s"
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            outcome.error = f"{type(error).__name__}: {error}"[:WORDS]
        outcome.ended = time.perf_counter()
        if outcome.error is None and not outcome.stamps:
            outcome.error = "an empty reply"

    async def _ask(self, outcome: Outcome, path: str, body: dict[str, Any]) -> None:
        reader, writer = await self._open()
        try:
            writer.write(self._request("POST", path, json.dumps(body).encode()))
            status, headers = await _head(reader)
            chunked = "chunked" in headers.get("transfer-encoding", "")
            if status != 200:
                outcome.error = f"{status}: {_said(await _rest(reader, headers))}"[:WORDS]
                return
            done, pending = False, b""
            while not done:
                data = await _chunk(reader) if chunked else await reader.read(1 << 16)
                if not data:
                    break
                now = time.perf_counter()
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    done = _take(outcome, line, now) or done
            if not done and outcome.error is None:
                outcome.error = "the stream ended without [DONE]"
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.url)
        secure = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if secure else 80)
        return await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=LIMIT)

    def _request(self, verb: str, path: str, data: bytes) -> bytes:
        parts = urlsplit(self.url)
        lines = [f"{verb} {parts.path.rstrip('/').removesuffix('/v1')}{path} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += ["Connection: close", "Accept: */*", f"Content-Length: {len(data)}"]
        if data:
            lines.append("Content-Type: application/json")
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        return "\r\n".join([*lines, "", ""]).encode() + data


async def get_json(target: Target, path: str, seconds: float = 10.0) -> tuple[int, Any]:
    """(status, JSON) of a GET. Raises OSError, ValueError or TimeoutError."""
    async with asyncio.timeout(seconds):
        reader, writer = await target._open()
        try:
            writer.write(target._request("GET", path, b""))
            status, headers = await _head(reader)
            return status, json.loads(await _rest(reader, headers))
        except asyncio.IncompleteReadError as error:
            raise OSError("the connection was closed") from error
        finally:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, by their names in small letters."""
    words = (await reader.readline()).split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ValueError("the answer is not HTTP" if words else "the connection was closed before an answer")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    """The next chunk; empty at the end."""
    size = int((await reader.readline()).split(b";")[0], 16)
    return (await reader.readexactly(size + 2))[:size]


async def _rest(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" in headers.get("transfer-encoding", ""):
        out = b""
        while (part := await _chunk(reader)) and len(out) < LIMIT:
            out += part
        return out
    length = headers.get("content-length")
    return await (reader.readexactly(min(int(length), LIMIT)) if length else reader.read(LIMIT))


def _take(outcome: Outcome, line: bytes, now: float) -> bool:
    """Read a line of the stream; True for its last one."""
    if not line.startswith(b"data:"):
        return False
    data = line[5:].strip()
    if data == b"[DONE]":
        return True
    event = json.loads(data)
    if event.get("error") is not None:
        outcome.error = f"in the stream: {_said(data)}"[:WORDS]
        return True
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("tool_calls"):
            outcome.stamps.append(now)
            if not outcome.counted:
                outcome.tokens += 1
    used = event.get("usage")
    if used:
        outcome.tokens, outcome.prompt_tokens = used.get("completion_tokens", 0), used.get("prompt_tokens", 0)
        outcome.counted = True
    return False


def _said(data: bytes) -> str:
    """The message of an error's body."""
    try:
        value = json.loads(data)
    except ValueError:
        return data.decode(errors="replace").strip()
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
