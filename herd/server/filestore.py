"""Files that clients have uploaded, and what batches made: a folder for each, with a limit on all of them. No torch.

Paths are made of ids of our own. A client's name for a file is told back to it, and used for nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from herd.errors import ConfigError
from herd.hub.lock import locked
from herd.server.errors import ApiError
from herd.server.state import new_id

__all__ = ["Files", "Kept", "plain_name", "write_json"]

MOST = 10_000
MOST_UPLOADS = 16
"""Uploads at once."""
CHUNK = 1 << 20
_ID = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class Kept:
    """A file: `bytes` long, of `owner`. Times are seconds since 1970; without `expires_at` it stays until it is deleted."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None

    def shown(self) -> dict[str, Any]:
        """OpenAI's file object."""
        told = {name: value for name, value in asdict(self).items() if name != "owner"}
        return {"object": "file", "status": "processed", "status_details": None, **told}


class Files:
    """The files below `folder`, at most `most_bytes` of them together. Raises ConfigError when another server has the folder."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self._most_bytes = folder / "files", most_bytes
        self._held = ExitStack()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked(folder / "herd.lock", lambda seconds: _taken(folder), lambda: None))
        except OSError as error:
            raise ConfigError(f"the state folder {folder} cannot be used: {error.strerror or error}") from None
        self._lock, self._adopting = threading.RLock(), threading.Lock()
        self._kept: dict[str, Kept] = {}
        self._reserved: dict[object, int] = {}
        self._readers: Counter[str] = Counter()
        for path in sorted(self.folder.iterdir()):
            if (found := _read(path)) is not None:
                self._kept[found.id] = found
            else:
                shutil.rmtree(path, ignore_errors=True)  # what a server that was killed had begun

    def close(self) -> None:
        """Another server may have the folder."""
        self._held.close()

    def find(self, id: str, owner: str) -> Kept:
        """The file `id` of `owner`. Raises ApiError (404)."""
        self._forget_expired()
        with self._lock:
            found = self._kept.get(id)
        if found is None or found.owner != owner:
            raise ApiError(404, f"there is no file {id[:80]!a}")
        return found

    def every(self, owner: str) -> list[Kept]:
        """All files of `owner`, the newest first."""
        self._forget_expired()
        with self._lock:
            kept = list(self._kept.values())
        mine = (one for one in reversed(kept) if one.owner == owner)  # of one second, too
        return sorted(mine, key=lambda one: -one.created_at)

    def path(self, kept: Kept) -> Path:
        """Where its bytes are."""
        assert _ID.fullmatch(kept.id)
        return self.folder / kept.id / "content"

    def hold(self, id: str) -> None:
        """The file `id` is read: it does not expire until as many `release` it."""
        with self._lock:
            self._readers[id] += 1

    def release(self, id: str) -> None:
        """The file `id` is read by one less."""
        with self._lock:
            self._readers[id] -= 1
            if self._readers[id] <= 0:
                del self._readers[id]

    @contextmanager
    def uploading(self, size: int) -> Iterator[object]:
        """Room for an upload of `size` bytes, to be handed to `add`. Raises ApiError (429, 507)."""
        place = object()
        with self._lock:
            if len(self._reserved) >= MOST_UPLOADS:
                what = f"{MOST_UPLOADS} files are being uploaded, which is all that may at once: try again later"
                raise ApiError(429, what, code="rate_limit_exceeded", retry_after=1)
            self._reserve(place, size)
        try:
            yield place
        finally:
            with self._lock:
                self._reserved.pop(place, None)

    def _reserve(self, place: object, size: int) -> None:
        """Set `size` bytes aside for `place`. Raises ApiError (507)."""
        self._forget_expired()
        with self._lock:
            others = [room for one, room in self._reserved.items() if one is not place]
            count, used = len(self._kept) + len(others), sum(one.bytes for one in self._kept.values()) + sum(others)
            if count >= MOST or used + size > self._most_bytes:
                what = f"{count:,} files of {used:,} bytes are kept, and {MOST:,} of {self._most_bytes:,} may be"
                raise ApiError(507, f"there is no room for {size:,} bytes: {what}: delete some", code="storage_full")
            self._reserved[place] = size

    def add(
        self,
        source: BinaryIO,
        owner: str,
        filename: str,
        purpose: str,
        expires_after: int | None = None,
        *,
        place: object = None,
    ) -> Kept:
        """Keep what `source` holds, in the room of `uploading` if there is one. Blocks. Raises ApiError when there is none."""
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
        place = object() if place is None else place
        self._reserve(place, size)
        try:
            kept = _made(new_id("file-"), owner, filename, purpose, size, expires_after)
            path = self.path(kept)
            try:
                path.parent.mkdir()
                with path.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
                    file.flush()
                    os.fsync(file.fileno())
                self._enter(kept)
            except OSError as error:
                shutil.rmtree(path.parent, ignore_errors=True)
                what = f"the file cannot be kept: {error.strerror or error}"
                raise ApiError(507, what, code="storage_full") from None
        finally:
            with self._lock:
                self._reserved.pop(place, None)
        return kept

    def adopt(self, source: Path, id: str, owner: str, filename: str, purpose: str, expires_after: int | None) -> None:
        """Keep the file `source` of a server's own under `id`, unless that is kept: no second copy is made where links are
        possible, and no limit counts. `source` stays. Blocks. Raises OSError, and nothing is kept."""
        with self._adopting:
            if id not in self._kept:
                self._adopt(source, id, owner, filename, purpose, expires_after)

    def _adopt(self, source: Path, id: str, owner: str, filename: str, purpose: str, expires_after: int | None) -> None:
        kept = _made(id, owner, filename, purpose, source.stat().st_size, expires_after)
        path = self.path(kept)
        shutil.rmtree(path.parent, ignore_errors=True)
        try:
            path.parent.mkdir()
            with source.open("rb") as file:
                os.fsync(file.fileno())
            try:
                path.hardlink_to(source)
            except OSError:  # not every file system has them
                with source.open("rb") as file, path.open("wb") as copy:
                    shutil.copyfileobj(file, copy, CHUNK)
                    copy.flush()
                    os.fsync(copy.fileno())
            self._enter(kept)
        except OSError:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise

    def _enter(self, kept: Kept) -> None:
        write_json(self.path(kept).parent / "meta.json", asdict(kept))  # last: without it there is no file
        with self._lock:
            self._kept[kept.id] = kept

    def delete(self, kept: Kept) -> None:
        """Forget a file."""
        with self._lock:
            self._kept.pop(kept.id, None)
        shutil.rmtree(self.folder / kept.id, ignore_errors=True)

    def _forget_expired(self) -> None:
        now = time.time()
        with self._lock:
            kept = [one for one in self._kept.values() if one.expires_at is not None and one.expires_at <= now]
            late = [one for one in kept if one.id not in self._readers]
            for one in late:
                del self._kept[one.id]
        for one in late:
            self.delete(one)


def plain_name(name: str) -> str:
    """A client's file name without folders and what is no character of a name; 255 characters at most."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(c for c in last if c.isprintable() and c not in '"<>|:*?')[:255].strip(" .") or "file"


def write_json(path: Path, content: Any) -> None:
    """Write a small file, whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _made(id: str, owner: str, filename: str, purpose: str, size: int, expires_after: int | None) -> Kept:
    now = int(time.time())
    until = None if expires_after is None else now + expires_after
    return Kept(id, owner, plain_name(filename), purpose, size, now, until)


def _read(folder: Path) -> Kept | None:
    """What lies in a folder of ours; None when it is not whole."""
    try:
        found = Kept(**json.loads((folder / "meta.json").read_text(encoding="utf-8")))
        size = (folder / "content").stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    return found if found.id == folder.name and _ID.fullmatch(found.id) and size == found.bytes else None


def _taken(folder: Path) -> None:
    raise ConfigError(f"another server uses the state folder {folder}: give every server one of its own")
