"""A request for a provider's model, and the provider's answer to it. No torch.

The body goes there as it came, but for the model's name, whose prefix is taken off; what comes back has it put on again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response

from herd.errors import HerdError
from herd.server.caller import caller
from herd.server.errors import ApiError, api_error, error_body, error_response
from herd.server.process import WorkerError
from herd.server.providers.remote import Provider, plain_json
from herd.server.sse import DONE, EventStream, until_gone
from herd.server.state import Running, State, new_id, state_of, until_stopped

__all__ = ["relayed"]

log = logging.getLogger("herd.server")
LONGEST_EVENT = 32 << 20
"""Bytes of one server-sent event."""
OPERATIONS = {"chat/completions": "chat", "completions": "text_completion", "embeddings": "embeddings"}
"""Paths -> what OpenTelemetry calls them."""
LARGE = 1 << 20
"""Bytes of an answer that is read and written in another thread, so that the server goes on meanwhile."""


async def relayed(request: Request, provider: Provider, path: str, content: dict[str, Any]) -> Response:
    """The answer of `provider` to the body `content`, whose model is one of its; `path` is that behind /v1/.

    Raises ApiError when it gives none.
    """
    relay = _Relay(state_of(request), provider, path, content)
    events = relay.run()
    if not relay.streams:
        return await until_gone(request, _only(events)) or Response(status_code=499)
    first = await until_gone(request, anext(events))
    if first is None:
        return Response(status_code=499)
    if isinstance(first, Response):
        await events.aclose()
        return first
    return EventStream(_Bytes(events), ping_seconds=relay.state.settings.ping_seconds)


async def _only(events: AsyncGenerator[Response | bytes, None]) -> Response | bytes:
    async with contextlib.aclosing(events):
        return await anext(events)


class _Bytes:
    """An iterator, not a generator: closing one of those that was not begun would close nothing."""

    def __init__(self, events: AsyncGenerator[Response | bytes, None]) -> None:
        self._events = events

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        one = await anext(self._events)
        assert isinstance(one, bytes)
        return one

    async def aclose(self) -> None:
        await self._events.aclose()


class _Relay:
    """One request on its way."""

    def __init__(self, state: State, provider: Provider, path: str, content: dict[str, Any]) -> None:
        self.state, self.provider, self.path = state, provider, path
        self.name: str = content["model"]
        self.streams = content.get("stream") is True
        self.who, self.began = caller(), time.monotonic()
        self.first: float | None = None
        self.usage: dict[str, Any] = {}
        self.reasons: dict[int, str] = {}
        self.pieces = 0
        self.hides_usage = False
        self.fields = content
        self.span: dict[str, Any] = {}
        """What the span of this request is told."""
        body = {**content, "model": provider.own(self.name)}
        if self.streams and state.settings.rate_tokens is not None and path != "embeddings":
            options = content.get("stream_options")
            if options is None or (isinstance(options, dict) and not options.get("include_usage")):
                # Otherwise nobody learns what the reply took of the key's tokens.
                body["stream_options"] = {**(options or {}), "include_usage": True}
                self.hides_usage = True
        self.body = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    async def run(self) -> AsyncGenerator[Response | bytes, None]:
        """A response, or b"" and then the events of a stream. Raises ApiError before the first."""
        self._admit()
        self.who.model = self.name
        tracing = self.state.counts.tracing
        if tracing is None:
            watched: contextlib.AbstractContextManager[dict[str, Any]] = contextlib.nullcontext({})
        else:
            operation, fields = OPERATIONS[self.path], self.fields
            watched = tracing.relayed(operation, self.name, self.provider.name, fields, self.began)
        with watched as self.span:
            async with contextlib.aclosing(self._run()) as answers:
                async for one in answers:
                    yield one

    async def _run(self) -> AsyncGenerator[Response | bytes, None]:
        running = Running(self.name, new_id("relay-"))
        self.state.running.add(running)
        self.provider.users += 1
        real = over = False
        try:
            async with contextlib.aclosing(self._answer()) as answers:
                async for one in until_stopped(answers, running):
                    real = real or not isinstance(one, Response) or one.status_code < 300
                    over = isinstance(one, Response)
                    if isinstance(one, Response):
                        if one.status_code >= 500:  # what it says can repeat what was asked: the client is told
                            log.warning("provider %s answered with status %d", self.provider.name, one.status_code)
                        self._count(real, None if real else f"Status{one.status_code}")
                    yield one
            if not over:
                over = True
                self._count(real, None)
        except Exception as error:
            if not over:
                over = True
                self._count(real, f"Status{api_error(error).status}")
            if not real:
                raise
            if not isinstance(error, HerdError):
                log.error("provider %s: %s", self.provider.name, type(error).__name__, exc_info=error)
            # A part of the stream has been sent: what went wrong is its last event.
            said = api_error(error if isinstance(error, HerdError) else WorkerError("", kind="Bug"))
            log.error(
                "provider %s: a stream ends with an error: status %d, %s", self.provider.name, said.status, said.code
            )
            yield _event(error_body(said, "openai")) + DONE
        finally:
            if not over:
                self.state.counts.metrics.remote_left(self.provider.label(self.name, real=real))
            self._spend()
            self.provider.users -= 1
            self.state.running.discard(running)

    def _admit(self) -> None:
        settings = self.state.settings
        self.state.check_open()
        if self.provider.users >= settings.max_queue:
            self.state.counts.metrics.refused("queue")
            what = (
                f"{self.provider.users} requests wait for {self.provider.name}, which is all that may: try again later"
            )
            raise ApiError(429, what, code="queue_full", retry_after=5)

    async def _answer(self) -> AsyncGenerator[Response | bytes, None]:
        provider = self.provider
        async with provider.send("POST", self.path, self.body) as response:
            if response.status_code >= 300 or response.status_code < 200:
                yield error_response(await provider.refusal(response), "openai")
                return
            kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
            if not self.streams:
                data = await provider.read(response)
                yield await asyncio.to_thread(self._whole, data) if len(data) > LARGE else self._whole(data)
                return
            if kind != "text/event-stream":
                raise ApiError(502, f"{provider.name} did not answer with a stream", code="provider_failed")
            yield b""
            async for event in self._events(response):
                yield event

    def _whole(self, data: bytes) -> Response:
        try:
            said = plain_json(data)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise ApiError(502, f"{self.provider.name} answered with no JSON object", code="provider_failed")
        if said.get("error") and "choices" not in said and "data" not in said:
            return error_response(self.provider.told(said), "openai")
        self._take(said)
        return Response(_json(said), 200, media_type="application/json")

    async def _events(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        lines: list[bytes] = []
        async for line in self._lines(response):
            if line:
                if not line.startswith(b":"):
                    lines.append(line)
                if sum(map(len, lines)) > LONGEST_EVENT:
                    raise self._broken("sent an event that is too long")
                continue
            event, lines = self._event(lines), []
            if event:
                yield event
            if event.endswith(DONE):
                return
        if lines and (event := self._event(lines)):
            yield event
            if event.endswith(DONE):
                return
        if not self.reasons:
            raise self._broken("broke off its answer")
        yield DONE

    async def _lines(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """Lines by LF or CRLF. (httpx's also end at U+2028, which JSON may hold.)"""
        rest = bytearray()
        async for part in response.aiter_bytes():
            start = max(0, len(rest))
            rest += part
            if len(rest) > LONGEST_EVENT:
                raise self._broken("sent an event that is too long")
            if rest.find(b"\n", start) < 0:
                continue
            *whole, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            for line in whole:
                yield line.removesuffix(b"\r")
        if rest:
            yield bytes(rest).removesuffix(b"\r")

    def _event(self, lines: list[bytes]) -> bytes:
        """An event as clients get it; nothing for one without data."""
        data = b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
        if not data.strip():
            return b""
        if data.strip() == b"[DONE]":
            return DONE
        try:
            said = plain_json(data)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise self._broken("sent an event that is no JSON object")
        if said.get("error"):
            raise self.provider.told(said)
        self.first = self.first or time.monotonic()
        self._take(said)
        if self.hides_usage and said.pop("usage", None) and not said.get("choices"):
            return b""
        name = next((line for line in lines if line.startswith(b"event:")), None)
        return (b"" if name is None else name + b"\n") + _event(said)

    def _take(self, said: dict[str, Any]) -> None:
        """Put the model's name back, and note what is counted."""
        if "model" in said:
            said["model"] = self.name
        if isinstance(said.get("usage"), dict):
            self.usage = said["usage"]
        choices = said.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self.pieces += 1
                index, reason = choice.get("index"), choice.get("finish_reason")
                if isinstance(reason, str):
                    self.reasons[index if isinstance(index, int) else 0] = reason

    def _broken(self, what: str) -> ApiError:
        return ApiError(502, f"{self.provider.name} {what}", code="provider_failed")

    def _count(self, real: bool, problem: str | None) -> None:
        label, metrics = self.provider.label(self.name, real=real), self.state.counts.metrics
        self.span["error.type"] = problem
        if self.usage:
            prompt, made = self._tokens()
            self.span |= {"gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": made}
        if self.first is not None:
            self.span["gen_ai.response.time_to_first_chunk"] = self.first - self.began
        if self.reasons:
            self.span["gen_ai.response.finish_reasons"] = [self.reasons[index] for index in sorted(self.reasons)]
        if problem is not None:
            metrics.remote_failed(label, problem)
            return
        now = time.monotonic()
        first = None if self.first is None else self.first - self.began
        metrics.remote(label, *self._tokens(), list(self.reasons.values()), now - self.began, first)

    def _tokens(self) -> tuple[int, int]:
        """Of the prompt and of the reply, as the provider says; without that, each piece of a stream is a token."""
        prompt, made = (self.usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
        told = made if isinstance(made, int) else self.pieces if self.streams else 0
        return max(0, prompt) if isinstance(prompt, int) else 0, max(0, told)

    def _spend(self) -> None:
        prompt, made = self._tokens()
        self.who.prompt_tokens += prompt
        self.who.generated_tokens += made
        self.state.counts.rates.spend(self.who.account, prompt + made)


def _json(said: Any) -> bytes:
    """As ASCII: halves of characters, which some send in two pieces, stay what they were."""
    return json.dumps(said, ensure_ascii=True, separators=(",", ":")).encode()


def _event(said: Any) -> bytes:
    return b"data: " + _json(said) + b"\n\n"
