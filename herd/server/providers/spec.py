"""What a provider is: a name, an address, and the environment variable that holds its key. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from herd.errors import ConfigError

__all__ = ["ProviderSpec"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProviderSpec:
    """A server with OpenAI's API at `url`; clients call its models `name/model`. Raises ConfigError.

    A URL without a path gets /v1. The key itself is never part of the settings: `key_env` names the environment variable that
    it is in (empty: HERD_PROVIDER_<NAME>_KEY, which need not be set).
    """

    name: str
    url: str
    key_env: str = ""

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise ConfigError(
                f"a provider cannot be called {self.name[:80]!r}: its name is letters, digits, _ and -, 64 at most"
            )
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        if not host or parts.scheme not in ("http", "https") or not self.url.isprintable() or " " in self.url:
            raise ConfigError(f"provider {self.name}: expected NAME=https://HOST/v1, or http:// for one that is near")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ConfigError(
                f"provider {self.name}: the URL has a user, a query or a fragment: put the key into {self.variable}"
            )
        path = parts.path.rstrip("/") or "/v1"
        object.__setattr__(self, "url", f"{parts.scheme}://{parts.netloc}{path}")

    @property
    def variable(self) -> str:
        """The environment variable of the key."""
        return self.key_env or f"HERD_PROVIDER_{self.name.upper().replace('-', '_')}_KEY"

    def key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """The key; None when the variable is not set. Raises ConfigError, which never shows it."""
        key = environment.get(self.variable, "").strip()
        if not key:
            if self.key_env:
                raise ConfigError(f"provider {self.name}: the environment variable {self.key_env} is not set")
            return None
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"provider {self.name}: {self.variable} holds no key: expected one word of ASCII")
        return key
