"""API keys: kept and compared as hashes. No torch.

A key is compared with every known one, each comparison in constant time, so that how long it takes tells nothing.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from herd.errors import ConfigError

__all__ = ["Key", "Keys", "hashed", "read_keys"]

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
LONGEST = 4096
"""Bytes of a key. What is longer is no key, and is not hashed."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key that is known: its name in logs and metrics, and its SHA-256."""

    name: str
    digest: str


def hashed(entry: str) -> str:
    """A key as it is kept: "[NAME ]KEY" or "[NAME ]sha256:HEX" becomes "NAME sha256:HEX". Raises ConfigError."""
    words = entry.split()
    if len(words) not in (1, 2) or len(words[-1].encode()) > LONGEST:
        raise ConfigError("an API key is one word, or a name and a word, of 4,096 bytes at most")
    if not words[-1].isascii():
        raise ConfigError("an API key has ASCII characters only: HTTP headers hold no others")
    secret = words[-1] if _HASH.fullmatch(words[-1]) else f"sha256:{sha256(words[-1].encode()).hexdigest()}"
    name = words[0] if len(words) == 2 else f"key-{secret[7:15]}"
    if _NAME.fullmatch(name) is None:
        raise ConfigError("the name of an API key is letters, digits and _.@- only, 64 at most")
    return f"{name} {secret}"


def read_keys(path: str | Path) -> tuple[str, ...]:
    """The keys of a file: one a line, as `hashed` takes them; # begins a comment. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the API keys in {path} cannot be read: {error}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            try:
                keys.append(hashed(text))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
    if not keys:
        raise ConfigError(f"there is no API key in {path}: write one a line, or leave the file out to ask for none")
    return tuple(keys)


class Keys:
    """The keys of a server, as `hashed` writes them. Without any, everybody may come in."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._keys = [Key(*hashed(entry).replace("sha256:", "").split()) for entry in entries]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, headers: Sequence[tuple[bytes, bytes]]) -> Key | None:
        """The key that a request's headers show: `Authorization: Bearer KEY`, or Anthropic's `x-api-key: KEY`."""
        given = _given(headers)
        if given is None or len(given) > LONGEST:
            return None
        digest, found = sha256(given).hexdigest(), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def _given(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The key in the headers. Two different ones are none."""
    found = set()
    for name, value in headers:
        if name == b"authorization":
            scheme, _, word = value.strip().partition(b" ")
            found.add(word.strip() if scheme.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            found.add(value.strip())
    return found.pop() or None if len(found) == 1 else None
