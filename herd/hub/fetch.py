"""One file into the cache: from where the last try ended, checked before it gets its name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from herd.errors import HubError
from herd.hub.cache import RepoCache
from herd.hub.listing import Check, Listing, RemoteFile, Source
from herd.hub.lock import locked
from herd.hub.remote import SEGMENT
from herd.hub.web import Interrupted, OutOfRange, Patience

__all__ = ["Quiet", "Watch", "fetch"]


class Watch(Protocol):
    """Told how a download goes, from several threads at once."""

    def begin(self, files: list[tuple[str, int]]) -> None:
        """What will be downloaded: names and sizes in bytes."""
        ...

    def moved(self, name: str, done: int) -> None:
        """`done` bytes of the file are here; fewer than before when it begins again."""
        ...

    def kept(self, name: str, done: int) -> None:
        """As `moved`, for bytes that were here before: they are no part of the rate."""
        ...

    def note(self, text: str) -> None:
        """Something that people should know."""
        ...


class Quiet:
    """A `Watch` that keeps what was said in `notes`."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def begin(self, files: list[tuple[str, int]]) -> None:
        """Nothing."""

    def moved(self, name: str, done: int) -> None:
        """Nothing."""

    def kept(self, name: str, done: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def fetch(
    source: Source, listing: Listing, file: RemoteFile, cache: RepoCache, patience: Patience, watch: Watch
) -> None:
    """The content of `file` (size and digest known) as a blob of `cache`; nothing happens when it is there already.

    What arrives goes into `<digest>.incomplete`, at its place in the file, so that a killed download goes on from its length and
    two writers without a working lock write the same bytes to the same places. Raises HubError; Stopped.
    """
    assert file.digest is not None
    assert file.size is not None
    blob = cache.blob(file.digest.value)
    with locked(
        cache.lock(blob.name),
        patience.pause,
        lambda: watch.note(f"{file.path}: waiting, somebody else is downloading it"),
    ):
        if blob.is_file():
            watch.kept(file.path, file.size)
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = blob.with_name(blob.name + ".incomplete")
        try:
            resumed, wrong = _download(source, listing, file, part, patience, watch)
        except HubError as error:
            if error.cause == "mismatch":
                _remove(part)
            raise
        if wrong is not None and resumed:
            watch.note(f"{file.path}: the part from an earlier download was damaged; it is downloaded from the start")
            _remove(part)
            _, wrong = _download(source, listing, file, part, patience, watch)
        if wrong is not None:
            _remove(part)
            raise HubError(
                f"{listing.repo}: {file.path} is not what {source.where} says it is: expected {file.digest.kind} "
                f"{file.digest.value}, got {wrong}; the file was removed. Run this again; if it fails again, the server or "
                "something on the way changes it",
                cause="mismatch",
            )
        with contextlib.suppress(FileNotFoundError):  # another writer without a working lock was faster
            os.replace(part, blob)
        if not blob.is_file():
            raise HubError(f"{blob} disappeared while it was written", cause="disk")


def _download(
    source: Source, listing: Listing, file: RemoteFile, part: Path, patience: Patience, watch: Watch
) -> tuple[bool, str | None]:
    """Fill `part`: whether there was something in it, and the digest that it has now if that is the wrong one."""
    try:
        with open(part, "r+b" if part.exists() else "w+b", buffering=0) as out:
            stream = _Stream(out, source, listing, file, patience, watch)
            resumed = stream.check.count > 0
            while stream.check.count < stream.size:
                try:
                    stream.go_on()
                except Interrupted as failure:
                    if isinstance(failure, OutOfRange):
                        stream.begin_again()
                    patience.wait(failure, f"{listing.repo}/{file.path}")
            os.fsync(out.fileno())
    except OSError as error:
        raise HubError(f"{part}: cannot be written: {error.strerror or error}", cause="disk") from error
    return resumed, None if stream.check.holds else stream.check.value


class _Stream:
    """A file on its way: what is in `out` so far, hashed, whoever wrote it and when."""

    def __init__(
        self, out: BinaryIO, source: Source, listing: Listing, file: RemoteFile, patience: Patience, watch: Watch
    ) -> None:
        assert file.digest is not None
        assert file.size is not None
        self._out, self._source, self._listing, self._file = out, source, listing, file
        self._patience, self._watch = patience, watch
        self.digest, self.size = file.digest, file.size
        self.check = Check(self.digest, self.size)
        self._read_kept()
        self._furthest = self.check.count

    def _read_kept(self) -> None:
        """Hash what an earlier try left; more than the file can hold is not kept."""
        if self._out.seek(0, os.SEEK_END) > self.size:
            self._out.truncate(0)
        self._out.seek(0)
        while chunk := self._out.read(1 << 22):
            self.check.update(chunk)
            self._watch.kept(self._file.path, self.check.count)
            self._patience.check()

    def go_on(self) -> None:
        """Ask for the rest and write it as it comes. Raises Interrupted when that ended early."""
        with self._source.open(self._listing, self._file, self.check.count) as body:
            if body.start != self.check.count:  # a server without ranges begins at 0
                self.begin_again()
            self._out.seek(self.check.count)
            for chunk in body.chunks:
                self._write(chunk)
        if self.check.count < self.size and self.check.count % SEGMENT:
            raise Interrupted("the connection ended early")

    def begin_again(self) -> None:
        """Forget what is here."""
        self.check = Check(self.digest, self.size)
        self._out.truncate(0)
        self._watch.moved(self._file.path, 0)

    def _write(self, chunk: bytes) -> None:
        if self.check.count + len(chunk) > self.size:
            raise HubError(
                f"{self._listing.repo}: {self._file.path} is longer than the {self.size:,} bytes that {self._source.where} says; "
                "the file was removed",
                cause="mismatch",
            )
        rest = memoryview(chunk)
        while rest:
            rest = rest[self._out.write(rest) :]
        self.check.update(chunk)
        if self.check.count > self._furthest:  # not on the same bytes again and again
            self._furthest = self.check.count
            self._patience.progressed()
        self._watch.moved(self._file.path, self.check.count)
        self._patience.check()


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):
        part.unlink()
