"""The source behind an endpoint: a hub, a plain mirror on the web, or a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from herd.errors import HubError
from herd.hub.fetch import Watch
from herd.hub.listing import Listing, RemoteFile, Source
from herd.hub.plain import CHUNK, FolderSource, StaticSource
from herd.hub.remote import HubSource
from herd.hub.settings import HUB, Settings
from herd.hub.web import Web

__all__ = ["source_at"]

LARGE = 256 << 20
"""Bytes of a file that is read for more than a moment."""


@contextlib.contextmanager
def source_at(where: Settings, watch: Watch) -> Iterator[Source]:
    """The source that `where` names, with its connections open inside the block."""
    if where.endpoint.startswith("file:"):
        yield FolderSource(where.endpoint, lambda name, done, total: _reading(watch, name, done, total))
        return
    web = Web(where.endpoint, where.token, where.token_from)
    if web.muted:
        watch.note(f"the token from {where.token_from} is not sent to {where.endpoint}: it is not encrypted")
    try:
        yield _Sources(where, web)
    finally:
        web.close()


def _reading(watch: Watch, name: str, done: int, total: int) -> None:
    """Say why nothing seems to happen: a digest of a large file takes as long as reading it."""
    if total >= LARGE and done <= CHUNK:
        watch.note(f"reading {name} for its digest (a SHA256SUMS file in the mirror saves that)")


class _Sources:
    """The source of an endpoint: a hub, and where it turns out to be none, a plain mirror."""

    def __init__(self, where: Settings, web: Web) -> None:
        self._plain = StaticSource(where.endpoint, web)
        self._hub = HubSource(where.endpoint, web)
        self._source: Source = self._hub
        self._may_be_plain = where.endpoint != HUB

    @property
    def where(self) -> str:
        """The address."""
        return self._source.where

    def listing(self, repo: str, revision: str) -> Listing:
        """What the hub lists, or else the mirror's manifest."""
        try:
            return self._hub.listing(repo, revision)
        except HubError as error:
            if error.cause != "mirror" or not self._may_be_plain:
                raise
        self._source = self._plain
        return self._plain.listing(repo, revision)

    def described(self, listing: Listing, file: RemoteFile) -> RemoteFile:
        """See Source."""
        return self._source.described(listing, file)

    def open(self, listing: Listing, file: RemoteFile, start: int):  # as the source's
        """See Source."""
        return self._source.open(listing, file, start)
