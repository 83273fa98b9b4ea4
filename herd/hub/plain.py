"""Plain mirrors: a folder tree, on disk (`file:///mirror`) or behind any web server, in which ORG/NAME holds the files.

What a mirror must say is what its files are: in `SHA256SUMS`, made with `sha256sum`, or in Meta's `checklist.chk` (md5). A folder
on disk needs neither: it is read once for its digests. A copied Hugging Face cache (`models--ORG--NAME`) is a mirror, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from herd.errors import CheckpointError, HubError
from herd.files import safe_join
from herd.hub.cache import RepoCache
from herd.hub.listing import Body, Digest, Listing, RemoteFile, digest_of
from herd.hub.remote import WebSource, body_from

__all__ = ["CHUNK", "FolderSource", "StaticSource", "manifest"]

MANIFESTS = {"SHA256SUMS": "sha256", "checklist.chk": "md5"}
LARGEST_MANIFEST = 8 << 20
CHUNK = 4 << 20
"""Bytes read at once for a digest."""
_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{32}|[0-9a-fA-F]{64}) [ *](?P<name>.+)")


class StaticSource(WebSource):
    """A folder tree behind a web server: no listing, no commits, only files. A `herd.hub.listing.Source`."""

    def listing(self, repo: str, revision: str) -> Listing:
        """The files of the mirror's manifest."""
        _only_main(repo, revision, self._endpoint)
        tried = []
        for name in MANIFESTS:
            try:
                with self._web.request("GET", f"{self._endpoint}/{repo}/{name}", repo) as answer:
                    text = b""
                    for chunk in answer.chunks:
                        text += chunk
                        if len(text) > LARGEST_MANIFEST:
                            raise HubError(
                                f"{self._endpoint}/{repo}/{name} is larger than any manifest", cause="mirror"
                            )
            except HubError as error:
                if error.cause not in ("no_repo", "no_file", "mirror"):
                    raise
                tried.append(name)
                continue
            files = manifest(text.decode(errors="replace"), f"{self._endpoint}/{repo}/{name}")
            return _listing(repo, revision, [RemoteFile(path, None, digest) for path, digest in files.items()])
        raise HubError(
            f"{self._endpoint} is no hub, and as a plain mirror it has no {' or '.join(tried)} in {repo}/: check the address and "
            "the name, or make the manifest in that folder: find . -type f ! -name SHA256SUMS -exec sha256sum {} + > SHA256SUMS",
            cause="no_repo",
        )

    def described(self, listing: Listing, file: RemoteFile) -> RemoteFile:
        """`file` with its size."""
        if file.size is not None:
            return file
        with self._web.request("HEAD", self._address(listing, file), listing.repo) as answer:
            size = answer.headers.get("content-length") or ""
        if not size.isdigit():
            raise HubError(f"{self._endpoint} does not say how large {file.path} is", cause="mirror")
        return RemoteFile(file.path, int(size), file.digest)

    @contextlib.contextmanager
    def open(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[Body]:
        """The bytes of `file` from `start` on."""
        with body_from(self._web, self._address(listing, file), listing.repo, file.size, start) as body:
            yield body

    def _address(self, listing: Listing, file: RemoteFile) -> str:
        return f"{self._endpoint}/{listing.repo}/{quote(file.path)}"


class FolderSource:
    """A folder tree on disk. A `herd.hub.listing.Source` that needs no network.

    `reading(name, done, total)` is told how far the digests are when there is no manifest.
    """

    def __init__(self, endpoint: str, reading: Callable[[str, int, int], None]) -> None:
        self._root = Path(url2pathname(urlsplit(endpoint).path))
        self._reading = reading

    @property
    def where(self) -> str:
        """The folder."""
        return str(self._root)

    def listing(self, repo: str, revision: str) -> Listing:
        """The files of ORG/NAME, or those of a snapshot where the mirror is a Hugging Face cache."""
        if not self._root.is_dir():
            raise HubError(f"{self._root}: there is no such folder", cause="mirror")
        held = RepoCache(self._root, repo)
        commit = held.commit_of(revision)
        if commit is not None:
            files = [_of_blob(name, path) for name, path in held.files(commit)]
            if all(file is not None for file in files) and re.fullmatch(r"[0-9a-f]{40}", commit):
                return Listing(repo, revision, commit, tuple(file for file in files if file is not None))
        _only_main(repo, revision, str(self._root))
        folder = self._folder(repo)
        known: dict[str, Digest] = {}
        for name in MANIFESTS:
            if (file := folder / name).is_file():
                known = manifest(file.read_text(errors="replace"), str(file)) | known
        return _listing(repo, revision, [self._file(folder, name, known) for name in _walk(folder)])

    def described(self, listing: Listing, file: RemoteFile) -> RemoteFile:
        """`file`: a folder says everything at once."""
        return file

    @contextlib.contextmanager
    def open(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[Body]:
        """The bytes of `file` from `start` on."""
        try:
            with open(self._path(listing, file.path), "rb") as opened:
                opened.seek(start)
                yield Body(start, iter(lambda: opened.read(1 << 20), b""))
        except (OSError, CheckpointError) as error:
            raise HubError(f"{self._root}: {file.path} cannot be read: {error}", cause="mirror") from error

    def _folder(self, repo: str) -> Path:
        folder = self._root.joinpath(*repo.split("/"))
        if not folder.is_dir():
            raise HubError(
                f"{self._root} holds no {repo} (and no {RepoCache(self._root, repo).folder.name})", cause="no_repo"
            )
        return folder

    def _path(self, listing: Listing, name: str) -> Path:
        snapshot = RepoCache(self._root, listing.repo).snapshot(listing.commit)
        return safe_join(snapshot if snapshot.is_dir() else self._folder(listing.repo), name)

    def _file(self, folder: Path, name: str, known: dict[str, Digest]) -> RemoteFile:
        path = safe_join(folder, name)
        size = path.stat().st_size
        if name in known:
            return RemoteFile(name, size, known[name])
        check = hashlib.sha256(usedforsecurity=False)
        with open(path, "rb") as opened:
            done = 0
            while chunk := opened.read(CHUNK):
                check.update(chunk)
                done += len(chunk)
                self._reading(name, done, size)
        return RemoteFile(name, size, Digest("sha256", check.hexdigest()))


def manifest(text: str, where: str) -> dict[str, Digest]:
    """Name -> digest, from lines as `sha256sum` and `md5sum` write them. Raises HubError for anything else."""
    files: dict[str, Digest] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line)
        digest = digest_of(found["digest"]) if found else None
        if found is None or digest is None:
            raise HubError(f"{where}: line {number} is not a digest and a file name", cause="mirror")
        name = found["name"].removeprefix("./")
        files[name] = digest
    if not files:
        raise HubError(f"{where}: names no files", cause="mirror")
    return files


def _walk(folder: Path) -> Iterator[str]:
    """The visible files below `folder`, manifests left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name != "SHA256SUMS":
                yield Path(place, name).relative_to(folder).as_posix()


def _of_blob(name: str, path: Path) -> RemoteFile | None:
    """A file of a snapshot whose link says its digest; None for copies and links to nothing."""
    if not path.is_symlink() or not path.is_file():
        return None
    digest = digest_of(os.path.basename(os.readlink(path)))
    return None if digest is None else RemoteFile(name, path.stat().st_size, digest)


def _listing(repo: str, revision: str, files: list[RemoteFile]) -> Listing:
    """A commit for files without one: the same files give the same."""
    lines = sorted(
        f"{file.path}\0{file.digest.kind}\0{file.digest.value}\n" for file in files if file.digest is not None
    )
    return Listing(
        repo, revision, hashlib.sha1("".join(lines).encode(), usedforsecurity=False).hexdigest(), tuple(files)
    )


def _only_main(repo: str, revision: str, where: str) -> None:
    if revision != "main":
        raise HubError(
            f"{where} is a plain mirror, which has no revisions such as {revision} of {repo}", cause="no_revision"
        )
