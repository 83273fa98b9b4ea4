"""Servers with OpenAI's API, as this one sees them: what models they have, and what they answer. No torch.

Clients choose a model's name, never an address. Their own keys and headers stay here. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from herd import __version__
from herd.errors import ConfigError, UnknownModelError
from herd.server.errors import ApiError
from herd.server.providers.spec import ProviderSpec
from herd.server.settings import ServerSettings

__all__ = ["Provider", "Providers", "plain_json"]

log = logging.getLogger("herd.server")
CONNECT_SECONDS = 10.0
READ_SECONDS = 600.0
"""Between two pieces of an answer: a whole reply may be made before its first byte."""
LIST_SECONDS = 5.0
"""For the list of models, all together."""
FRESH_SECONDS = 60.0
"""How long a list of models, or that there is none, is believed."""
LONGEST_LIST = 8 << 20
LONGEST_ANSWER = 256 << 20
LONGEST_REFUSAL = 1 << 20
"""Bytes."""
MOST_MODELS = 4096
MOST_COUNTED = 1000
"""Models of a provider that have counts of their own in metrics."""


class Provider:
    """A provider and what is known of it. `users` are requests that it answers now."""

    def __init__(self, spec: ProviderSpec) -> None:
        self.spec, self.name = spec, spec.name
        self._key = spec.key()
        try:
            httpx.URL(spec.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"provider {spec.name}: {error}") from None
        self._client: httpx.AsyncClient | None = None
        self._rows: list[dict[str, Any]] = []
        self._listed: float | None = None
        self._looking = asyncio.Lock()
        self._counted: set[str] = set()
        self.problem: str | None = None
        """Why its models could not be listed the last time."""
        self.users = 0

    @property
    def state(self) -> str:
        """unasked, ready or failed: as of the last time that its models were listed."""
        return "unasked" if self._listed is None else "ready" if self.problem is None else "failed"

    def own(self, name: str) -> str:
        """The provider's own name of the model that clients call `name`."""
        return name.removeprefix(f"{self.name}/")

    def label(self, name: str, *, real: bool) -> str:
        """What a model is called in metrics. Clients can say any name: only `real` ones, which were answered, get a label."""
        if name in self._counted or (real and len(self._counted) < MOST_COUNTED):
            self._counted.add(name)
            return name
        return f"{self.name}/other"

    def hidden(self, text: str) -> str:
        """`text` without the key, should the provider repeat it."""
        return text if self._key is None else text.replace(self._key, "[key]")

    async def close(self) -> None:
        """Close its connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    @asynccontextmanager
    async def send(self, method: str, path: str, body: bytes | None = None) -> AsyncGenerator[httpx.Response, None]:
        """The answer to a request, of which only the head was read. Raises ApiError (502, 504) when there is none."""
        if self._client is None:
            headers = {"User-Agent": f"herd/{__version__}", "Accept-Encoding": "identity"}
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            self._client = httpx.AsyncClient(
                headers=headers,
                follow_redirects=False,
                timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS, write=60.0),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            )
        head = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._client.stream(method, f"{self.spec.url}/{path}", content=body, headers=head) as response:
                self._client.cookies.clear()
                if 300 <= response.status_code < 400:
                    raise ApiError(
                        502, f"{self.name} sends requests elsewhere, which are not followed: mount the address itself",
                        code="provider_failed",
                    )  # fmt: skip
                yield response
        except httpx.TimeoutException as error:
            log.warning("provider %s: %s", self.name, type(error).__name__)
            raise ApiError(504, f"{self.name} did not answer in time", code="provider_timeout") from None
        except httpx.HTTPError as error:
            log.warning("provider %s: %s", self.name, self.hidden(str(error)) or type(error).__name__)
            broke = not isinstance(error, httpx.ConnectError)
            what = "broke off its answer" if broke else "cannot be reached"
            raise ApiError(502, f"{self.name} {what}", code="provider_failed") from None

    async def read(self, response: httpx.Response, most: int = LONGEST_ANSWER) -> bytes:
        """The body of an answer. Raises ApiError (502) for more than `most` bytes."""
        data = bytearray()
        async for part in response.aiter_bytes():
            data += part
            if len(data) > most:
                raise ApiError(502, f"{self.name} answered with more than {most:,} bytes", code="provider_failed")
        return bytes(data)

    async def refusal(self, response: httpx.Response) -> ApiError:
        """What an error of the provider says, in OpenAI's shape and with its status."""
        status = response.status_code
        if status in (401, 407):  # it is the key of this server that it does not take, not the client's
            log.warning("provider %s does not take the key of %s (status %d)", self.name, self.spec.variable, status)
            return ApiError(502, f"{self.name} does not take this server's key", code="provider_key_refused")
        try:
            said = plain_json(await self.read(response, LONGEST_REFUSAL))
        except (ApiError, ValueError):
            said = None
        return self.told(said, status, _seconds(response.headers.get("retry-after")))

    def told(self, said: Any, status: int = 502, retry: float | None = None) -> ApiError:
        """An error that a provider wrote as JSON."""
        error = said.get("error", said) if isinstance(said, dict) else said
        about = error if isinstance(error, dict) else {"message": error}
        text, type_, param, code = (about.get(name) for name in ("message", "type", "param", "code"))
        if not isinstance(text, str) or not text:
            text = f"{self.name} answered with status {status}, and no reason"
        return ApiError(
            status if 400 <= status < 600 else 502,
            self.hidden(text),
            type=type_ if isinstance(type_, str) else None,
            param=param if isinstance(param, str) else None,
            code=str(code) if isinstance(code, str | int) and not isinstance(code, bool) else None,
            retry_after=retry,
        )

    async def models(self) -> list[dict[str, Any]]:
        """Its models as rows of /v1/models, not older than a minute; none when it does not answer, see `problem`."""
        async with self._looking:
            now = time.monotonic()
            if self._listed is None or now - self._listed >= FRESH_SECONDS:
                before = self.problem
                try:
                    async with asyncio.timeout(LIST_SECONDS):
                        self._rows, self.problem = await self._list(), None
                except TimeoutError:
                    self._rows, self.problem = [], f"it did not list its models in {LIST_SECONDS:g} s"
                except (ApiError, ValueError) as error:
                    self._rows, self.problem = [], self.hidden(str(error))
                self._listed = time.monotonic()
                if self.problem is not None and self.problem != before:
                    log.warning("provider %s is left out of the list of models: %s", self.name, self.problem)
                elif self.problem is None and before is not None:
                    log.warning("provider %s answers again", self.name)
            return self._rows

    async def _list(self) -> list[dict[str, Any]]:
        async with self.send("GET", "models") as response:
            if response.status_code != 200:
                raise await self.refusal(response)
            found = plain_json(await self.read(response, LONGEST_LIST))
        rows = found.get("data") if isinstance(found, dict) else None
        if not isinstance(rows, list):
            raise ValueError("what it answers is no list of models: is the URL right?")
        known = {row["id"]: row for row in rows if isinstance(row, dict) and _is_name(row.get("id"))}
        if len(known) < len(rows) or len(known) > MOST_MODELS:
            log.warning("provider %s: of %d models, %d are listed", self.name, len(rows), min(len(known), MOST_MODELS))
        return [self._row(id, known[id]) for id in list(known)[:MOST_MODELS]]

    def _row(self, id: str, row: dict[str, Any]) -> dict[str, Any]:
        created, owner, length = row.get("created"), row.get("owned_by"), row.get("max_model_len")
        return {
            "id": f"{self.name}/{id}",
            "object": "model",
            "created": created if isinstance(created, int) else 0,
            "owned_by": owner if isinstance(owner, str) else self.name,
            "root": id,
            "parent": None,
            "max_model_len": length if isinstance(length, int) else None,
            "meta": {"state": "remote", "provider": self.name},
        }


class Providers:
    """The providers of a server. Raises ConfigError for a key that is not there."""

    def __init__(self, settings: ServerSettings) -> None:
        self.all = {spec.name: Provider(spec) for spec in settings.providers}

    def of(self, content: Any) -> Provider | None:
        """The provider whose model a request with this body is for."""
        name = content.get("model") if self.all and isinstance(content, dict) else None
        return self.named(name) if isinstance(name, str) else None

    def named(self, name: str) -> Provider | None:
        """The provider whose model clients call `name`."""
        head, slash, own = name.partition("/")
        return self.all.get(head) if slash and own else None

    async def models(self) -> list[dict[str, Any]]:
        """The models of all that answer."""
        return [row for rows in await asyncio.gather(*(one.models() for one in self.all.values())) for row in rows]

    async def model(self, name: str) -> dict[str, Any] | None:
        """The row of the model that clients call `name`; None when it is none of a provider's. Raises UnknownModelError, or
        ApiError (502) when the provider does not answer."""
        provider = self.named(name)
        if provider is None:
            return None
        rows = await provider.models()
        if provider.problem is not None:
            raise ApiError(502, f"{provider.name} does not list its models now", code="provider_failed")
        found = next((row for row in rows if row["id"] == name), None)
        if found is None:
            raise UnknownModelError(f"{provider.name} lists no model {provider.own(name)[:80]!a}")
        return found

    def health(self) -> dict[str, dict[str, str]]:
        """How each was when it was last asked. Where they are is not told: everybody may see this."""
        return {name: {"state": one.state} for name, one in self.all.items()}

    async def close(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(one.close() for one in self.all.values()))


def plain_json(data: bytes | str) -> Any:
    """The value of JSON from elsewhere. Raises ValueError."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _is_name(id: Any) -> bool:
    return isinstance(id, str) and 0 < len(id) <= 256 and id.isprintable()


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() and text.isascii() and len(text) < 8 else None
