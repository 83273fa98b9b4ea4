"""Responses that clients may come back to: in memory, as many as fit, the oldest forgotten first. No torch."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from herd.server.caller import caller

__all__ = ["OWNER", "Entry", "Stored", "owner_of"]

OWNER = "herd.owner"
"""Where the scope of a request that the server makes itself says whose it is."""

MOST = 10_000
MOST_BYTES = 256 << 20


@dataclass(slots=True)
class Entry:
    """A response: `body` as clients see it, `given` the items that the model was given, `owner` whose it is."""

    id: str
    owner: str
    body: dict[str, Any]
    given: list[dict[str, Any]]
    size: int = 0
    cancelled: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def items(self) -> list[dict[str, Any]]:
        """The conversation with what came of it."""
        return [*self.given, *self.body["output"]]


class Stored:
    """Responses by id. Of one owner, others know nothing."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def put(self, entry: Entry, fresh: int) -> None:
        """Keep a response; the last `fresh` items of what it was given are its own, the others are shared with earlier ones.

        What would take all the room alone is not kept.
        """
        self.drop(entry.id)
        entry.size = len(json.dumps([entry.body, entry.given[len(entry.given) - fresh :]])) + 64 * len(entry.given)
        if entry.size > self._most_bytes:
            return
        self._entries[entry.id] = entry
        self._bytes += entry.size
        while self._entries and (len(self._entries) > self._most or self._bytes > self._most_bytes):
            self.drop(next(iter(self._entries)))

    def find(self, id: str, owner: str) -> Entry | None:
        """The response `id`, if it is this owner's."""
        entry = self._entries.get(id)
        return entry if entry is not None and entry.owner == owner else None

    def drop(self, id: str) -> None:
        """Forget one."""
        entry = self._entries.pop(id, None)
        if entry is not None:
            self._bytes -= entry.size

    def __len__(self) -> int:
        return len(self._entries)


def owner_of(request: Request) -> str:
    """Whose a request is: something that tells API keys apart and is not one. Without keys all are the same."""
    told = request.scope.get(OWNER)
    return caller().secret if told is None else told
