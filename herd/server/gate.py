"""What every request passes before the application sees it, and what is noted when it is over. Pure ASGI; no torch.

In this order: a request id; `Host` and `Origin`; preflights; the API key; draining; rates; the size of the body. A refusal has
the shape of the API that was called. Nothing of a request's body is ever logged.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from hashlib import sha256
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from herd.server.auth import Keys
from herd.server.caller import Caller, calling
from herd.server.errors import ApiError, api_error, error_response, shape_of
from herd.server.origins import CORS, EXPOSED, host_allowed, origin_allowed
from herd.server.pages import is_page
from herd.server.rates import Rates

if TYPE_CHECKING:
    from herd.server.state import State

__all__ = ["Gate", "is_open"]

log = logging.getLogger("herd.access")
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_READS = ("GET", "HEAD", "OPTIONS")
MOST_HEAD = 64 << 10
"""Bytes of a path and headers together."""
FORM = 64 << 10
"""Bytes of a form around a file."""
FREE = 64 << 10
"""Bytes of every body that `max_bodies` does not count: every connection has a buffer of that size anyway, and small requests
are taken while large ones fill the rest."""
LATE = 499
"""The status in the log of a request whose client went away before it was answered."""


def is_open(path: str, open_metrics: bool = False) -> bool:
    """Whether `path` needs no API key: the web page, which asks for one itself, and whether the server is well."""
    return path == "/health" or is_page(path) or (open_metrics and path == "/metrics")


class Gate:
    """The outermost middleware. `state` holds the settings, the rates and the metrics."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state
        settings = state.settings
        self.keys = Keys(settings.api_keys)
        self.rates: Rates = state.counts.rates
        self.most_bodies = max(settings.max_bodies, settings.max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = _Visit(self, scope, receive, send)
        with calling(visit.caller):
            await visit.run()


class _Visit:
    """One request on its way through."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope = gate, scope
        self.receive, self.send = receive, send
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.settings = gate.state.settings
        client = scope.get("client")
        self.caller = Caller(_request_id(self._first(b"x-request-id")), address=client[0] if client else "")
        self.caller.server, self.caller.trace = scope.get("server"), self._trace()
        self.path: str = _below(self.settings.root_path, scope["path"])
        self.method: str = scope["method"]
        self.most = self.settings.max_body
        """Bytes of the body, at most. Files that are uploaded have a limit of their own, and go to disk."""
        self.kept = self.path.rstrip("/") != "/v1/files"
        """Whether the body is kept in memory. Files go to disk as they come."""
        if not self.kept:
            self.most = max(self.most, getattr(self.settings, "max_file", 0) + FORM)
        self.origin = _text(self._first(b"origin"))
        self.began = time.perf_counter()
        self.status: int | None = None
        self.entered = False
        """Whether rates count it as being answered."""
        self.got = self.held = 0

    async def run(self) -> None:
        """Answer it."""
        try:
            if await self._pass():
                self._admit()
                await self.gate.app(self.scope, self._receive, self._send)
        except ClientDisconnect:
            self.status = self.status or LATE
        except asyncio.CancelledError:
            self.status = self.status or LATE
            raise
        except Exception as error:  # the application has answered 500 already, and this is for the log
            log.error("%s %s: %s", self.method, self.path[:200], type(error).__name__, exc_info=error)
            if self.status is None:
                await self._refuse(api_error(error))
        finally:
            self._end()

    def _admit(self) -> None:
        if self.method not in _READS:
            self.caller.admitted = True
            self.gate.state.visits += 1

    async def _pass(self) -> bool:
        """Whether the application shall see it; otherwise it has been answered."""
        try:
            self._check_head()
            self._check_names()
            if self.method == "OPTIONS":
                await self._preflight()
                return False
            self._check_key()
            self._check_load()
            self._check_size()
        except ApiError as error:
            await self._refuse(error)
            return False
        return True

    def _check_names(self) -> None:
        authority = _text(self._first(b"host"))
        listening, allowed = self.settings.host, self.settings.allowed_hosts
        if not host_allowed(authority, listening, allowed):
            raise ApiError(
                403,
                f"this server is not called {(authority or '')[:100]!a}: use its address, or allow the name with "
                "--allowed-hosts",
                code="host_not_allowed",
            )
        asks = self.method not in _READS or not is_open(self.path)
        if self.origin and asks and not origin_allowed(self.origin, authority, self.settings.allowed_origins):
            raise ApiError(
                403,
                f"pages of {self.origin[:100]!a} may not use this server: allow them with --allowed-origins",
                code="origin_not_allowed",
            )

    def _check_key(self) -> None:
        if not self.gate.keys or is_open(self.path, self.settings.open_metrics):
            return
        key = self.gate.keys.find(self.headers)
        if key is None:
            raise ApiError(
                401,
                "this server asks for an API key: send Authorization: Bearer KEY (or x-api-key: KEY) with one that it knows",
                type="authentication_error",
                code="invalid_api_key",
            )
        self.caller.key, self.caller.secret = key.name, sha256(f"owner {key.digest}".encode()).hexdigest()

    def _check_load(self) -> None:
        if self.method in _READS:
            return
        if self.gate.state.draining:
            raise ApiError(503, "the server is shutting down: try another one", code="shutting_down", retry_after=5)
        rates = self.gate.rates
        if rates.limited:
            try:
                self.caller.headers |= rates.enter(self.caller.account)
            except ApiError:
                self.gate.state.counts.metrics.refused("rate")
                raise
            self.entered = True

    def _check_head(self) -> None:
        head = sum(len(name) + len(value) for name, value in self.headers) + len(self.scope.get("raw_path") or b"")
        if head + len(self.scope["query_string"]) > MOST_HEAD:
            raise ApiError(431, f"the head of the request is larger than {MOST_HEAD:,} bytes", code="request_too_large")

    def _check_size(self) -> None:
        length = self._first(b"content-length")
        if length is not None and (not length.isdigit() or len(length) > 18 or int(length) > self.most):
            raise self._too_large()
        if length is not None:
            self._check_bodies(int(length))

    def _check_bodies(self, size: int) -> None:
        """Raise ApiError when a body of `size` bytes does not fit beside the others."""
        more = max(0, size - FREE) - self.held if self.kept else 0
        if more > 0 and self.gate.state.counts.bodies + more > self.gate.most_bodies:
            self.gate.state.counts.metrics.refused("bodies")
            raise ApiError(
                503,
                f"the bodies of all requests together are larger than {self.gate.most_bodies:,} bytes: try again later",
                code="server_busy",
                retry_after=1,
            )

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.most:,} bytes, which is all that this server takes at once",
                        code="request_too_large")  # fmt: skip

    async def _receive(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.got += len(message.get("body", b""))
            if self.got > self.most:
                raise self._too_large()
            self._check_bodies(self.got)
            if self.kept and (more := max(0, self.got - FREE) - self.held) > 0:
                self.held += more
                self.gate.state.counts.bodies += more
        return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=list(message.get("headers", [])))
            headers["X-Request-Id"] = self.caller.request
            if shape_of(self.path) == "anthropic":
                headers["request-id"] = self.caller.request
            headers.setdefault("X-Content-Type-Options", "nosniff")
            for name, value in (self.caller.headers | self._cors()).items():
                headers[name] = value
            message = {**message, "headers": headers.raw}
        await self.send(message)

    def _cors(self) -> dict[str, str]:
        """What a browser needs to hear when a page from elsewhere was allowed."""
        if not self.origin or not self.settings.allowed_origins:
            return {}
        if not origin_allowed(self.origin, None, self.settings.allowed_origins):
            return {"Vary": "Origin"}
        return {"Access-Control-Allow-Origin": self.origin, "Vary": "Origin", "Access-Control-Expose-Headers": EXPOSED}

    async def _preflight(self) -> None:
        wanted = _text(self._first(b"access-control-request-headers")) or "*"
        allowed = wanted if re.fullmatch(r"[A-Za-z0-9_, -]{1,1000}", wanted) else "*"
        headers = {**CORS, "Access-Control-Allow-Headers": allowed} if self._cors() else {}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 204, "headers": raw})
        await self._send({"type": "http.response.body", "body": b""})

    async def _refuse(self, error: ApiError) -> None:
        response = error_response(error, shape_of(self.path))
        await response(self.scope, self.receive, self._send)

    def _end(self) -> None:
        state, seconds = self.gate.state, time.perf_counter() - self.began
        self.gate.state.counts.bodies -= self.held + self.caller.fetched
        state.visits -= self.caller.admitted
        if self.entered:
            self.gate.rates.leave(self.caller.account)
        route = self.scope.get("route")
        state.counts.metrics.http(getattr(route, "path", None) or _handler(self.path), self.method, self.status or LATE)
        if self.settings.log_requests:
            caller = self.caller
            fields = {
                "method": self.method, "path": self.path[:500], "status": self.status or LATE,
                "seconds": round(seconds, 4), "bytes_in": self.got, "client": caller.address or None, "key": caller.key,
                "model": caller.model, "prompt_tokens": caller.prompt_tokens or None,
                "generated_tokens": caller.generated_tokens or None,
            }  # fmt: skip
            polled = self.path in ("/health", "/metrics") and self.status in (200, 503)
            log.log(logging.DEBUG if polled else logging.INFO, "request", extra={"fields": fields})

    def _trace(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for key, value in self.headers:
            if key in (b"traceparent", b"tracestate"):
                name, text = key.decode(), value.decode("latin-1").strip()
                found[name] = f"{found[name]},{text}" if name in found else text
        return found

    def _first(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)


def _request_id(given: bytes | None) -> str:
    """The client's own id when it is a harmless word, a new one otherwise."""
    if given is not None and _ID.fullmatch(given):
        return given.decode()
    return f"req-{secrets.token_hex(12)}"


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1").strip()


def _below(root: str, path: str) -> str:
    """`path` without `root`, where it is below that."""
    rest = path.removeprefix(root)
    return rest if root and rest.startswith("/") else path


def _handler(path: str) -> str:
    """The label of a path that is no route's: never what a client invented."""
    return "/web" if is_page(path) else "other"
