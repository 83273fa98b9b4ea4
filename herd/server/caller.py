"""Who sent the request that is being answered: set for each request by the gate, read wherever it matters. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = ["CALLER", "Caller", "caller", "calling", "salted"]


@dataclass(slots=True)
class Caller:
    """A request's id and whose it is. `key` names the API key (None: none is asked for), `secret` tells keys apart and never
    leaves the server. `headers` are added to the answer when it begins. What the request came to is noted for the log.
    `server` is the address that was reached, `trace` the headers of W3C Trace Context. `admitted`: the server has taken the
    request on, and does all of it, also when it ends meanwhile. `fetched`: bytes of images that were fetched for it."""

    request: str = ""
    key: str | None = None
    secret: str = ""
    address: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    server: tuple[str, int | None] | None = None
    trace: dict[str, str] = field(default_factory=dict)
    admitted: bool = False
    fetched: int = 0

    @property
    def account(self) -> str:
        """What rates are counted by: the key, or without keys the address."""
        return self.secret or self.address


CALLER: ContextVar[Caller | None] = ContextVar("herd_caller", default=None)


@contextmanager
def calling(who: Caller) -> Iterator[None]:
    """What runs inside runs for `who`."""
    token = CALLER.set(who)
    try:
        yield
    finally:
        CALLER.reset(token)


def caller() -> Caller:
    """The caller of what runs now; an anonymous one outside of requests."""
    return CALLER.get() or Caller()


def salted(salt: str) -> str:
    """A request's own `salt` as the one of its key: prompts of two keys never share cached prefixes."""
    secret = caller().secret
    return f"{secret[:32]}/{salt}" if secret else salt
