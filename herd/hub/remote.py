"""A hub that speaks the Hugging Face protocol.

`GET /api/models/REPO/revision/REV?blobs=true` lists (siblings with size, blobId and, for large files, lfs.sha256);
`GET /REPO/resolve/COMMIT/FILE` gives, through a redirect where the file is large. A server that does not know the first of
them may still be a plain folder on the web: see `herd.hub.plain`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from herd.errors import HubError
from herd.files import short
from herd.hub.cache import COMMIT
from herd.hub.listing import Body, Listing, RemoteFile, digest_of
from herd.hub.web import Web

__all__ = ["SEGMENT", "HubSource", "WebSource", "body_from"]

SEGMENT = 32 << 30
"""Bytes asked for at once; an answer ends at a multiple of it. Content networks give one plain request no more than 50 GB."""


class WebSource:
    """What sources behind an address share."""

    def __init__(self, endpoint: str, web: Web) -> None:
        self._endpoint, self._web = endpoint, web

    @property
    def where(self) -> str:
        """The address of the hub or mirror."""
        return self._endpoint


class HubSource(WebSource):
    """A `herd.hub.listing.Source` over HTTP(S)."""

    def listing(self, repo: str, revision: str) -> Listing:
        """What the hub lists. HubError with the cause "mirror" when the answer is not a hub's."""
        url = f"{self._endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
        said = self._web.json(url, repo)
        if not isinstance(said, dict) or not isinstance(said.get("siblings"), list):
            raise HubError(f"{self._endpoint} does not answer as a hub does", cause="mirror")
        commit = said.get("sha")
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise HubError(
                f"{self._endpoint}: the listing of {repo} names no commit but {short(commit)}", cause="server"
            )
        return Listing(repo, revision, commit, tuple(_file(entry, repo) for entry in said["siblings"]))

    def described(self, listing: Listing, file: RemoteFile) -> RemoteFile:
        """`file` with what a HEAD request says where the listing says nothing."""
        if file.size is not None and file.digest is not None:
            return file
        with self._web.request("HEAD", self._address(listing, file), listing.repo) as answer:
            etag = answer.first.get("x-linked-etag") or answer.first.get("etag")
            size = answer.first.get("x-linked-size") or answer.headers.get("content-length") or ""
            commit = answer.first.get("x-repo-commit")
        if commit is not None and commit != listing.commit:
            raise HubError(f"{listing.repo} changed while it was looked at: run this again", cause="server")
        digest = file.digest or digest_of(etag)
        if digest is None or not size.isdigit():
            raise HubError(
                f"{self._endpoint} gives no digest or size of {file.path}, so a download could not be checked",
                cause="server",
            )
        return RemoteFile(file.path, int(size), digest)

    @contextlib.contextmanager
    def open(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[Body]:
        """The bytes of `file` from `start` on, SEGMENT at most where the file is larger."""
        with body_from(self._web, self._address(listing, file), listing.repo, file.size, start) as body:
            yield body

    def _address(self, listing: Listing, file: RemoteFile) -> str:
        return f"{self._endpoint}/{listing.repo}/resolve/{listing.commit}/{quote(file.path)}"


@contextlib.contextmanager
def body_from(web: Web, url: str, repo: str, size: int | None, start: int) -> Iterator[Body]:
    """A GET with a range where that is worth it; `Body.start` is where the server really begins."""
    end = (start // SEGMENT + 1) * SEGMENT
    last = end - 1 if size is not None and end < size else None
    ranged = (start, last) if start or last is not None else None
    with web.request("GET", url, repo, ranged) as answer:
        begins = _begin(answer.headers.get("content-range", "")) if answer.status == 206 else 0
        if begins not in (0, start):
            raise HubError(
                f"{urlsplit(url).netloc} was asked for {short(repo)} from byte {start} and begins at {begins}",
                cause="server",
            )
        yield Body(begins, answer.chunks)


def _begin(content_range: str) -> int:
    """`bytes 5-9/10` begins at 5."""
    first = content_range.removeprefix("bytes").strip().partition("-")[0]
    return int(first) if first.isdigit() else -1


def _file(entry: Any, repo: str) -> RemoteFile:
    """One sibling of the listing."""
    name = entry.get("rfilename") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise HubError(f"the listing of {repo} holds {short(entry)}, which is no file", cause="server")
    lfs = entry.get("lfs")
    if isinstance(lfs, dict):
        digest = digest_of(_text(lfs.get("sha256") or lfs.get("oid")))
        size = lfs.get("size", entry.get("size"))
        digest = digest if digest is not None and digest.kind == "sha256" else None
    else:
        digest, size = digest_of(_text(entry.get("blobId"))), entry.get("size")
    if type(size) is not int or not 0 <= size < 1 << 53:
        size = None
    return RemoteFile(name, size, digest)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
