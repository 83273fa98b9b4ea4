"""How much each account may ask for: requests and tokens a minute, and requests at once. No torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice

from herd.server.errors import ApiError

__all__ = ["Rates"]

MOST_ACCOUNTS = 100_000
"""Accounts that are remembered. Beyond, one is forgotten for each that comes: to be forgotten is to be full again."""
LOOKED_AT = 64
"""Of so many that were not heard of for the longest, the one is forgotten that owes the least."""


@dataclass(slots=True)
class _Bucket:
    """Refills evenly, so many a minute. It may be overdrawn: what a reply took is known when it is over."""

    size: float
    left: float
    at: float

    def fill(self, now: float) -> None:
        self.left = min(self.size, self.left + (now - self.at) * self.size / 60)
        self.at = now

    def wait(self, wanted: float) -> float:
        """Seconds until `wanted` are there."""
        return max(0.0, (wanted - self.left) * 60 / self.size)


@dataclass(slots=True)
class _Account:
    requests: _Bucket | None
    tokens: _Bucket | None
    now: int = 0

    def debt(self, now: float) -> float:
        """Seconds until it is full again."""
        buckets = [bucket for bucket in (self.requests, self.tokens) if bucket is not None]
        for bucket in buckets:
            bucket.fill(now)
        return max((bucket.wait(bucket.size) for bucket in buckets), default=0.0)


class Rates:
    """Limits for each account; None: no limit."""

    def __init__(self, requests: int | None, tokens: int | None, at_once: int | None) -> None:
        self.requests, self.tokens, self.at_once = requests, tokens, at_once
        self._accounts: dict[str, _Account] = {}

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return not (self.requests is None and self.tokens is None and self.at_once is None)

    def enter(self, account: str, *, now: float | None = None) -> dict[str, str]:
        """Take a request on; `leave` when it is over. Returns OpenAI's headers about what is left. Raises ApiError (429)."""
        now = time.monotonic() if now is None else now
        found = self._account(account, now)
        if self.at_once is not None and found.now >= self.at_once:
            raise _refused(f"{found.now} requests of this key are being answered, which is all that may at once", 1.0)
        for bucket, wanted, what in ((found.requests, 1.0, "requests"), (found.tokens, 1.0, "tokens")):
            if bucket is not None and bucket.left < wanted:
                raise _refused(f"more than {bucket.size:g} {what} a minute", bucket.wait(wanted))
        if found.requests is not None:
            found.requests.left -= 1
        found.now += 1
        return _headers(found)

    def leave(self, account: str) -> None:
        """A request that was taken on is over."""
        found = self._accounts.get(account)
        if found is not None:
            found.now = max(0, found.now - 1)

    def spend(self, account: str, tokens: int, *, now: float | None = None) -> None:
        """A reply of so many tokens, its prompt included."""
        if self.tokens is not None:
            bucket = self._account(account, time.monotonic() if now is None else now).tokens
            assert bucket is not None
            bucket.left -= tokens

    def _account(self, name: str, now: float) -> _Account:
        found = self._accounts.pop(name, None)
        if found is None:
            found = _Account(
                None if self.requests is None else _Bucket(self.requests, self.requests, now),
                None if self.tokens is None else _Bucket(self.tokens, self.tokens, now),
            )
            if len(self._accounts) >= MOST_ACCOUNTS:
                self._forget(now)
        self._accounts[name] = found  # the last one heard of stands last
        for bucket in (found.requests, found.tokens):
            if bucket is not None:
                bucket.fill(now)
        return found

    def _forget(self, now: float) -> None:
        """One account: of those that are full again, or else owe the least, the one that was not heard of for the longest."""
        oldest = [(key, one) for key, one in islice(self._accounts.items(), LOOKED_AT) if not one.now]
        if oldest:
            del self._accounts[min(oldest, key=lambda found: found[1].debt(now))[0]]


def _headers(account: _Account) -> dict[str, str]:
    out = {}
    for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
        if bucket is not None:
            out[f"x-ratelimit-limit-{name}"] = f"{bucket.size:.0f}"
            out[f"x-ratelimit-remaining-{name}"] = f"{max(0, math.floor(bucket.left))}"
            out[f"x-ratelimit-reset-{name}"] = f"{bucket.wait(bucket.size):.3f}s"
    return out


def _refused(what: str, seconds: float) -> ApiError:
    return ApiError(429, f"rate limit: {what}: try again later", code="rate_limit_exceeded", retry_after=seconds)
