"""Which names a server answers to, and which web pages may call it. No torch.

A page of any web site can make a browser send requests to this machine. Two checks stop it: `Host` must be a name of this
machine while the server listens on loopback (a name that was made to point here, "DNS rebinding", is not), and `Origin`, where
a browser sends one, must be the server itself or one that was allowed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

__all__ = ["CORS", "host_allowed", "host_of", "is_loopback", "origin_allowed"]

CORS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, HEAD, OPTIONS",
    "Access-Control-Max-Age": "600",
}
EXPOSED = "X-Request-Id, X-Herd-Truncated, X-Herd-Cache, Retry-After"
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine alone: localhost, a name below it, or a loopback address."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(authority: str) -> str | None:
    """The host of a Host header, in small letters and without its port; None when it is none."""
    found = _AUTHORITY.fullmatch(authority)
    return None if found is None else found[1].lower()


def host_allowed(authority: str | None, listening: str, allowed: Sequence[str]) -> bool:
    """Whether a request for `authority` is meant for a server that listens on `listening`.

    `allowed` are names, or "*". Without any, a server on loopback is called by names of loopback only, others by any.
    """
    if "*" in allowed or authority is None:  # HTTP/1.0 may do without; browsers never do
        return True
    host = host_of(authority)
    if host is None:
        return False
    if host in (name.lower() for name in allowed) or is_loopback(host):
        return True
    return not allowed and not is_loopback(listening)


def origin_allowed(origin: str, authority: str | None, allowed: Sequence[str]) -> bool:
    """Whether a page of `origin` may call the server that it knows as `authority`."""
    if "*" in allowed or origin.lower() in (one.lower().rstrip("/") for one in allowed):
        return True
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and authority is not None and rest.lower() == authority.lower()
