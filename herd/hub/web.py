"""HTTP as downloads need it: redirects that leave the token at home, ranges, timeouts, and trying again with patience."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import ipaddress
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from herd.errors import HubError
from herd.hub.refusal import refusal

__all__ = ["Answer", "Interrupted", "OutOfRange", "Patience", "Stopped", "Web"]

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0
"""Seconds without a byte before a connection counts as dead; huggingface_hub waits 10."""
REDIRECTS = 5
TRIES = 6
"""Failures in a row, without a byte between them, before a download is given up."""
LONGEST_WAIT = 300.0
"""Seconds that a server may ask us to stay away; what asks for more is an error that says so."""
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
HEAD_BYTES = 4096
"""Bytes read of an answer that is an error."""


class Interrupted(Exception):
    """A failure that may be gone on the next try. `after` is what the server asked us to wait, in seconds."""

    def __init__(self, message: str, after: float | None = None, *, limited: bool = False) -> None:
        super().__init__(message)
        self.after, self.limited = after, limited


class OutOfRange(Interrupted):
    """The server has no bytes from there on: what is here is not the beginning of its file."""


class Stopped(Exception):
    """Somebody pressed Ctrl-C, or another file failed for good."""


class Patience:
    """How often and how soon a failed request is tried again: after 1, 2, 4, ... seconds, or when the server says.

    `stop` ends every waiting at once.
    """

    def __init__(self, stop: threading.Event, tries: int = TRIES, first: float = 1.0) -> None:
        self._stop, self._tries, self._first = stop, tries, first
        self._failed = 0

    def progressed(self) -> None:
        """Bytes have come: the next failure is the first one again."""
        self._failed = 0

    def wait(self, failure: Interrupted, what: str) -> None:
        """Wait before the next try. Raises HubError when there have been enough, Stopped when everything ends."""
        self._failed += 1
        cause = "limited" if failure.limited else "network"
        kept = "what has arrived is kept: the same command goes on from there"
        if self._failed >= self._tries:
            raise HubError(f"{what}: {failure} ({self._failed} tries); {kept}", cause=cause)
        delay = min(self._first * 2 ** (self._failed - 1), 30.0) if failure.after is None else failure.after
        if delay > LONGEST_WAIT:
            raise HubError(f"{what}: {failure}: the server asks us to wait {delay:,.0f} s; {kept}", cause=cause)
        self.pause(delay)

    def check(self) -> None:
        """Raises Stopped when everything ends."""
        if self._stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Stopped when everything ends meanwhile."""
        if self._stop.wait(seconds):
            raise Stopped


@dataclass(frozen=True, slots=True)
class Answer:
    """A good answer: its headers, those of the first hop (where the hub puts its own before it redirects), its body."""

    status: int
    headers: Mapping[str, str]
    first: Mapping[str, str]
    chunks: Iterator[bytes]


class Web:
    """Requests to one endpoint. The token goes to its scheme, host and port, and nowhere else.

    Over plain HTTP the token is sent only to this machine; `muted` says that one was kept back.
    """

    def __init__(self, endpoint: str, token: str | None, token_from: str | None = None) -> None:
        self._home = _origin(endpoint)
        self.muted = token is not None and not _is_private(endpoint)
        self._token = None if self.muted else token
        self.token_from = token_from if self._token else None
        timeout = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        self._client = httpx.Client(
            verify=_certificates(),
            timeout=timeout,
            limits=limits,
            follow_redirects=False,
            headers={"User-Agent": "herd", "Accept-Encoding": "identity"},
        )

    def close(self) -> None:
        """Ends all connections."""
        self._client.close()

    @contextlib.contextmanager
    def request(
        self, method: str, url: str, repo: str, ranged: tuple[int, int | None] | None = None
    ) -> Iterator[Answer]:
        """One request, redirects included. `ranged` is (first byte, last byte or None).

        Raises Interrupted for what may pass, HubError for what will not, both also while the chunks are read.
        """
        headers: dict[str, str] = {}
        if ranged is not None:
            headers["Range"] = f"bytes={ranged[0]}-{'' if ranged[1] is None else ranged[1]}"
        first: Mapping[str, str] | None = None
        with _translated(url):
            for _ in range(REDIRECTS + 1):
                mine = headers | self._credentials(url)
                with self._client.stream(method, url, headers=mine) as response:
                    first = response.headers if first is None else first
                    if response.has_redirect_location:
                        url = _next(url, response.headers["location"])
                        continue
                    if response.status_code >= 300:
                        self._refuse(response, repo, moved=first is not response.headers)
                    yield Answer(response.status_code, response.headers, first, _chunks(response, url))
                    return
        raise HubError(f"{_short(url)}: more than {REDIRECTS} redirects", cause="server")

    def json(self, url: str, repo: str) -> Any:
        """The parsed body of a small answer; None when it is no JSON."""
        import json

        with self.request("GET", url, repo) as answer:
            body = b""
            for chunk in answer.chunks:
                body += chunk
                if len(body) > 64 << 20:
                    raise HubError(f"{_short(url)}: the answer is larger than any listing", cause="server")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return None

    def _credentials(self, url: str) -> dict[str, str]:
        if self._token is None or _origin(url) != self._home:
            return {}
        return {"Authorization": f"Bearer {self._token}"}

    def _refuse(self, response: httpx.Response, repo: str, moved: bool) -> None:
        """Raise what an unwanted status means."""
        status = response.status_code
        if status == 416:
            raise OutOfRange("the server has fewer bytes than there are here")
        if status in AGAIN:
            said = f"the server answered {status} {response.reason_phrase}".rstrip()
            raise Interrupted(said, _retry_after(response.headers), limited=status == 429)
        body = b""
        with contextlib.suppress(httpx.HTTPError):
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) >= HEAD_BYTES:
                    break
        raise refusal(
            status,
            response.headers,
            body[:HEAD_BYTES].decode(errors="replace"),
            url=str(response.url),
            repo=repo,
            token_from=self.token_from,
            muted=self.muted,
            moved=moved,
        )


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The certificates that are trusted, read once: SSL_CERT_FILE, else those of certifi."""
    return httpx.create_ssl_context()


def _chunks(response: httpx.Response, url: str) -> Iterator[bytes]:
    with _translated(url):
        yield from response.iter_bytes()  # as they come: a chunk that is waited for would be lost with the connection


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
        host = urlsplit(url).netloc
        why = str(error) or type(error).__name__
        if "certificate verify failed" in why.lower():
            raise HubError(
                f"{host}: its certificate cannot be verified ({why}): behind a company proxy, SSL_CERT_FILE names its "
                "certificates",
                cause="network",
            ) from error
        raise Interrupted(
            f"{host}: {'no answer in time' if isinstance(error, httpx.TimeoutException) else why}"
        ) from error
    except httpx.HTTPError as error:
        raise HubError(f"{_short(url)}: {error or type(error).__name__}", cause="network") from error
    except httpx.InvalidURL as error:
        raise HubError(f"{_short(url)}: no address: {error}", cause="server") from error


def _next(url: str, location: str) -> str:
    """Where a redirect leads. Raises HubError for another scheme than HTTP(S), and for one that gives up encryption."""
    target = urljoin(url, location)
    scheme, before = urlsplit(target).scheme, urlsplit(url).scheme
    if scheme not in ("http", "https") or (before == "https" and scheme == "http"):
        raise HubError(f"{_short(url)} redirects to {_short(target)}: refused", cause="server")
    return target


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _is_private(endpoint: str) -> bool:
    """Whether nobody on the way can read what is sent there."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme == "https" or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds: Retry-After as a number or a date, or the `t=` of the hub's RateLimit header when nothing is left (`r=0`)."""
    said = headers.get("retry-after", "").strip()
    if said.isdigit():
        return float(said[:9])
    if said:
        with contextlib.suppress(ValueError, TypeError, IndexError):
            return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    rate = headers.get("ratelimit", "")
    if re.search(r";\s*r=0\b", rate) and (left := re.search(r";\s*t=(\d{1,9})\b", rate)):
        return float(left[1])
    return None


def _short(url: str) -> str:
    """An address for messages: without its query, which may hold a signature."""
    return url.partition("?")[0][:200]
