"""Files that clients have uploaded, and what batches made: a folder for each, with a limit on all of them. No torch.

Paths are made of ids of our own. A client's name for a file is told back to it, and used for nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from herd.errors import ConfigError
from herd.hub.lock import locked
from herd.server.errors import ApiError
from herd.server.state import new_id

__all__ = ["Files", "Kept", "plain_name", "write_json"]

MOST = 10_000
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
        self._kept: dict[str, Kept] = {}
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
        found = self._kept.get(id)
        if found is None or found.owner != owner:
            raise ApiError(404, f"there is no file {id[:80]!a}")
        return found

    def every(self, owner: str) -> list[Kept]:
        """All files of `owner`, the newest first."""
        self._forget_expired()
        return sorted((one for one in self._kept.values() if one.owner == owner), key=lambda one: -one.created_at)

    def path(self, kept: Kept) -> Path:
        """Where its bytes are."""
        assert _ID.fullmatch(kept.id)
        return self.folder / kept.id / "content"

    def check_room(self, size: int) -> None:
        """Raise ApiError (413, 507) when `size` bytes more are too much."""
        self._forget_expired()
        used = sum(one.bytes for one in self._kept.values())
        if len(self._kept) >= MOST or used + size > self._most_bytes:
            what = f"{len(self._kept):,} files of {used:,} bytes are kept, and {self._most_bytes:,} bytes may be"
            raise ApiError(507, f"there is no room for {size:,} bytes: {what}: delete some", code="storage_full")

    def add(
        self,
        source: BinaryIO,
        owner: str,
        filename: str,
        purpose: str,
        expires_after: int | None = None,
        *,
        id: str | None = None,
        check: bool = True,
    ) -> Kept:
        """Keep what `source` holds, under `id` when that is given and new. Blocks. Raises ApiError when there is no room."""
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
        if check:
            self.check_room(size)
        now = int(time.time())
        until = None if expires_after is None else now + expires_after
        kept = Kept(id or new_id("file-"), owner, plain_name(filename), purpose, size, now, until)
        path = self.path(kept)
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
                file.flush()
                os.fsync(file.fileno())
            write_json(path.parent / "meta.json", asdict(kept))  # last: without it there is no file
        except OSError as error:
            shutil.rmtree(path.parent, ignore_errors=True)
            what = f"the file cannot be kept: {error.strerror or error}"
            raise ApiError(507, what, code="storage_full") from None
        self._kept[kept.id] = kept
        return kept

    def delete(self, kept: Kept) -> None:
        """Forget a file."""
        self._kept.pop(kept.id, None)
        shutil.rmtree(self.folder / kept.id, ignore_errors=True)

    def _forget_expired(self) -> None:
        now = time.time()
        for kept in [one for one in self._kept.values() if one.expires_at is not None and one.expires_at <= now]:
            self.delete(kept)


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
