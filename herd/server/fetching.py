"""Opening addresses that a client names, for images: off unless the server was started with --fetch-images. No torch.

Such an address is a way into the network of the server (SSRF): it is opened only where it leads to the public Internet. The
name is resolved here, once for every hop; all that it stands for must be public, and the connection goes to what was looked at,
so that a name which means something else a moment later (DNS rebinding) gains nothing. Redirects are followed by the same rules.
Proxies and credentials of the environment are not used, no cookies are kept, and nothing of a client's request is sent.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable

import httpx

from herd import __version__
from herd.server.errors import ApiError

__all__ = ["Fetcher", "is_public"]

log = logging.getLogger("herd.server")
SECONDS = 10.0
"""For all of it: names, redirects, the last byte."""
HOPS = 3
AT_ONCE = 4
PORTS = (80, 443)
WEB = re.compile(r"[\x21-\x7e]{1,2048}")
HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_TUNNELS = [ipaddress.ip_network(one) for one in ("2002::/16", "2001::/23", "64:ff9b:1::/48", "100::/64", "5f00::/16")]
_INSIDE = [ipaddress.ip_network(one) for one in ("192.0.0.0/24", "192.88.99.0/24", "100.64.0.0/10")]
"""Python's own list of what is not global has grown from version to version."""
_SERVICES = {ipaddress.ip_address(one) for one in ("168.63.129.16", "100.100.100.200")}
"""Services of clouds for their own machines, at addresses that are not private."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet: not of this machine, a private network, a link, a provider's inside,
    a group, or one that hides another address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.scope_id is not None or any(found in one for one in _TUNNELS) or found.is_site_local:
            return False
    elif any(found in one for one in _INSIDE):
        return False
    special = found.is_multicast or found.is_reserved or found.is_unspecified or found in _SERVICES
    return found.is_global and not special


async def resolved(host: str, port: int) -> list[str]:
    """The IP addresses of a name. Raises OSError."""
    loop = asyncio.get_running_loop()
    rows = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


class Fetcher:
    """Fetches what is behind addresses. `allowed` says which IP addresses may be reached (tests allow their own servers)."""

    def __init__(
        self,
        *,
        allowed: Callable[[str], bool] = is_public,
        resolve: Callable[[str, int], Awaitable[list[str]]] = resolved,
        ports: tuple[int, ...] = PORTS,
        tls: ssl.SSLContext | None = None,
        seconds: float = SECONDS,
    ) -> None:
        self._allowed, self._resolve, self._ports, self._seconds = allowed, resolve, ports, seconds
        self._tls = tls
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def fetch(self, url: str, most: int, took: Callable[[int], None] = lambda size: None) -> bytes:
        """The bytes of an image, `most` at most; `took(size)` hears of them as they come, and may raise.

        Raises ApiError (400), whose message goes on from "the image". An address that may not be reached is not told apart from
        one that cannot be: nobody shall learn from it what there is inside a network.
        """
        async with self._turns:
            try:
                async with asyncio.timeout(self._seconds):
                    return await self._followed(url, most, took)
            except TimeoutError:
                raise _refusal(f"did not come within {self._seconds:g} s") from None

    async def _followed(self, url: str, most: int, took: Callable[[int], None]) -> bytes:
        for _ in range(1 + HOPS):
            target = self._target(url)
            found = await self._opened(target, most, took)
            if isinstance(found, bytes):
                return found
            if target.scheme == "https" and found.scheme != "https":
                raise _refusal("is moved from https to an address without it")
            url = str(found)
        raise _refusal(f"is moved more than {HOPS} times")

    def _target(self, url: str) -> httpx.URL:
        """An address that may be opened, as far as its letters say. Raises ApiError."""
        wrong = _refusal(
            "has an address that is not opened: expected http:// or https://, a name, and no password or port"
        )
        if not WEB.fullmatch(url) or "\\" in url:
            raise wrong
        try:
            target = httpx.URL(url)
        except (httpx.InvalidURL, ValueError):
            raise wrong from None
        host = target.raw_host.decode("ascii", "replace")
        if target.scheme not in ("http", "https") or target.userinfo or not HOST.fullmatch(_bracketed(host)):
            raise wrong
        if _port(target) not in self._ports:
            raise wrong
        return target.copy_with(fragment=None)

    async def _opened(self, target: httpx.URL, most: int, took: Callable[[int], None]) -> bytes | httpx.URL:
        """What is at `target`, or where it has gone. Raises ApiError."""
        host, port = target.raw_host.decode("ascii"), _port(target)
        nowhere = _refusal("cannot be fetched: nothing at a public address answers there")
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            raise nowhere from None
        if not addresses or not all(map(self._allowed, addresses)):
            log.warning("an image is not fetched: its address leads to what is not public")
            raise nowhere
        head = {"Host": target.netloc.decode("ascii"), "User-Agent": f"herd/{__version__}", "Accept": "image/*",
                "Accept-Encoding": "identity"}  # fmt: skip
        pinned = target.copy_with(host=addresses[0])
        if target.scheme == "https" and self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        verify = self._tls if self._tls is not None and target.scheme == "https" else False
        try:
            async with (
                httpx.AsyncClient(
                    trust_env=False, follow_redirects=False, verify=verify, timeout=self._seconds
                ) as client,
                client.stream("GET", pinned, headers=head, extensions={"sni_hostname": host}) as response,
            ):
                if response.status_code in (301, 302, 303, 307, 308) and "location" in response.headers:
                    try:
                        return target.join(response.headers["location"])
                    except (httpx.InvalidURL, ValueError):
                        raise _refusal("is moved to what is no address") from None
                return await _body(response, most, took)
        except (httpx.HTTPError, ssl.SSLError, OSError) as error:
            log.info("an image is not fetched: %s", type(error).__name__)
            raise nowhere from None


async def _body(response: httpx.Response, most: int, took: Callable[[int], None]) -> bytes:
    if response.status_code != 200:
        raise _refusal(f"cannot be fetched: the answer is {response.status_code}")
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind.startswith("image/"):
        raise _refusal(f"is of type {kind[:40]!a}: expected an image's")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _refusal("comes compressed, which nobody asked for")
    told = response.headers.get("content-length", "")
    parts: list[bytes] = []
    size = int(told) if told.isdecimal() and len(told) < 16 else 0
    if size <= most:
        size = 0
        async for part in response.aiter_raw():
            size += len(part)
            if size > most:
                break
            took(len(part))
            parts.append(part)
    if size > most:
        raise _refusal(f"is larger than {most:,} bytes")
    return b"".join(parts)


def _port(target: httpx.URL) -> int:
    return target.port or {"http": 80, "https": 443}.get(target.scheme, 0)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _refusal(what: str) -> ApiError:
    return ApiError(400, what, code="image_not_fetched")
