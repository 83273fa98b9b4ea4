"""What a repository holds: the names, sizes and digests of its files, and how a digest is checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Body", "Check", "Digest", "Listing", "RemoteFile", "Source", "digest_of"]

_KINDS = {32: "md5", 40: "git", 64: "sha256"}


@dataclass(frozen=True, slots=True)
class Digest:
    """`kind` is sha256 (large files), git (git's sha1 of a blob: small files) or md5 (Meta's checklist.chk); `value` is hex."""

    kind: str
    value: str


def digest_of(text: str | None) -> Digest | None:
    """The digest that an ETag or a manifest spells; None when `text` is none."""
    value = (text or "").removeprefix("W/").strip('"').lower()
    return Digest(_KINDS[len(value)], value) if len(value) in _KINDS and re.fullmatch(r"[0-9a-f]+", value) else None


class Check:
    """Counts and hashes bytes in their order. `size` is the whole length, which git's digest begins with."""

    def __init__(self, digest: Digest, size: int) -> None:
        self.digest, self.size, self.count = digest, size, 0
        self._hash = hashlib.new("sha1" if digest.kind == "git" else digest.kind, usedforsecurity=False)
        if digest.kind == "git":
            self._hash.update(b"blob %d\0" % size)

    def update(self, data: bytes) -> None:
        """The next bytes of the file."""
        self.count += len(data)
        self._hash.update(data)

    @property
    def value(self) -> str:
        """The digest of what was seen, in hex."""
        return self._hash.hexdigest()

    @property
    def holds(self) -> bool:
        """Whether all of it was seen, and it is what the digest says."""
        return self.count == self.size and self.value == self.digest.value


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `path` has forward slashes; `size` in bytes and `digest` are None where the listing is silent."""

    path: str
    size: int | None
    digest: Digest | None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one commit of `repo`. `commit` is 40 hex digits, made from the digests where a mirror has no commits."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes on their way: those from `start` on (0 where the server cannot begin elsewhere), in `chunks`."""

    start: int
    chunks: Iterator[bytes]


class Source(Protocol):
    """A place that repositories are downloaded from. Every method raises HubError when it is refused."""

    @property
    def where(self) -> str:
        """The place in words, for messages."""
        ...

    def listing(self, repo: str, revision: str) -> Listing:
        """What `repo` holds at `revision`."""
        ...

    def described(self, listing: Listing, file: RemoteFile) -> RemoteFile:
        """`file` with its size and digest; costs a request where the listing has no such facts."""
        ...

    def open(self, listing: Listing, file: RemoteFile, start: int) -> AbstractContextManager[Body]:
        """The bytes of `file` from `start` on. Raises Interrupted where trying again may help, also while reading."""
        ...
