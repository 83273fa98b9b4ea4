"""The batches of a server, as they are kept: one JSON file each, beside the answers that there are so far. No torch."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from herd.server.errors import ApiError
from herd.server.filestore import write_json
from herd.server.state import new_id

__all__ = ["ENDED", "Batch", "BatchStore"]

log = logging.getLogger("herd.server")
DAY = 86_400
MOST_ACTIVE, MOST_KEPT = 100, 10_000
"""Batches of one owner that have not ended, and all of them: the ones that ended first are forgotten (their files stay)."""
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(slots=True)
class Batch:
    """A batch as it is kept. The ids of its files are chosen when it is made, so ending it twice makes no second file."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    output_id: str
    error_id: str
    output_expires_after: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    status: str = "validating"
    times: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    late: bool = False
    model: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    usage: dict[str, Any] | None = None

    def shown(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        times = {
            f"{name}_at": self.times.get(name)
            for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        }
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **times,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
            "model": self.model,
            "usage": self.usage,
        }

    def reach(self, status: str) -> None:
        """Take a status."""
        self.status = status
        self.times[status] = int(time.time())


class BatchStore:
    """All batches below `folder`, of every owner."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._batches: dict[str, Batch] = {}
        for path in sorted(self._folder.glob("batch_*.json")):
            try:
                found = Batch(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                log.error("the batch %s cannot be read and is left alone: %s", path.name, error)
                continue
            self._batches[found.id] = found

    def active(self) -> Iterator[Batch]:
        """Those that have not ended."""
        return (one for one in list(self._batches.values()) if one.status not in ENDED)

    def add(self, owner: str, source: str, endpoint: str, metadata: dict[str, str], keep: int | None) -> Batch:
        """A new batch of the requests in the file `source`; its output is kept for `keep` seconds. Raises ApiError (429, 507)."""
        if sum(one.owner == owner for one in self.active()) >= MOST_ACTIVE:
            what = f"{MOST_ACTIVE} batches have not ended, which is all that may at once: wait, or cancel some"
            raise ApiError(429, what, code="rate_limit_exceeded", retry_after=60)
        now = int(time.time())
        ids = (new_id("file-"), new_id("file-"))
        batch = Batch(new_id("batch_"), owner, endpoint, source, now, now + DAY, *ids, keep, metadata)
        try:
            self.save(batch)
        except OSError as error:
            what = f"the batch cannot be kept: {error.strerror or error}"
            raise ApiError(507, what, code="storage_full") from None
        self._batches[batch.id] = batch
        self._forget(owner)
        return batch

    def find(self, id: str, owner: str) -> Batch:
        """The batch `id` of `owner`. Raises ApiError (404)."""
        found = self._batches.get(id)
        if found is None or found.owner != owner:
            raise ApiError(404, f"there is no batch {id[:80]!a}")
        return found

    def every(self, owner: str) -> list[Batch]:
        """All of `owner`, the newest first."""
        mine = (one for one in reversed(self._batches.values()) if one.owner == owner)  # of one second, too
        return sorted(mine, key=lambda one: -one.created_at)

    def reader_of(self, file: str) -> str | None:
        """A batch that still reads `file`."""
        return next((b.id for b in self._batches.values() if b.input_file_id == file and b.status not in ENDED), None)

    def save(self, batch: Batch) -> None:
        """Write it down. Raises OSError."""
        write_json(self._folder / f"{batch.id}.json", asdict(batch))

    def end(self, batch: Batch, status: str) -> None:
        """Take a last status, which is written before it is seen. Raises OSError."""
        ended = replace(batch, times=dict(batch.times))
        ended.reach(status)
        self.save(ended)
        batch.status, batch.times = ended.status, ended.times

    def path(self, batch: Batch, what: str) -> Path:
        """Where its answers are kept until it has ended: `what` is output or errors."""
        return self._folder / f"{batch.id}.{what}.jsonl"

    def _forget(self, owner: str) -> None:
        """What ended longest ago, when too many are kept."""
        mine = [one for one in self._batches.values() if one.owner == owner]
        ended = sorted((one for one in mine if one.status in ENDED), key=lambda one: one.created_at)
        for one in ended[: max(0, len(mine) - MOST_KEPT)]:
            del self._batches[one.id]
            with contextlib.suppress(OSError):
                (self._folder / f"{one.id}.json").unlink(missing_ok=True)
