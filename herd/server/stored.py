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
ENTRY_BYTES, ITEM_BYTES, REFERENCE_BYTES = 4096, 1024, 64
"""What a response, an item and a mention of one take beside their text, rounded up: dictionaries are larger than their JSON."""


@dataclass(slots=True)
class Entry:
    """A response: `body` as clients see it, `given` the items that the model was given, `owner` whose it is."""

    id: str
    owner: str
    body: dict[str, Any]
    given: list[dict[str, Any]]
    size: int = 0
    """Bytes of what is its own alone, as JSON."""
    counted: list[dict[str, Any]] = field(default_factory=list)
    """The items that were counted for it."""
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
        self._items: dict[int, list[int]] = {}
        """Of every item that is kept, by its identity: how many responses have it, and its bytes. Conversations share items, and
        one lives for as long as any response that has it."""

    def put(self, entry: Entry) -> None:
        """Keep a response. What would take all the room alone, with its whole conversation, is not kept."""
        self.drop(entry.id)
        own = {key: value for key, value in entry.body.items() if key != "output"}
        entry.counted = entry.items
        entry.size = len(json.dumps(own)) + ENTRY_BYTES + REFERENCE_BYTES * len(entry.counted)
        alone = entry.size
        for item in entry.counted:
            held = self._items.get(_identity(item))
            if held is None:
                held = self._items[_identity(item)] = [0, len(json.dumps(item)) + ITEM_BYTES]
                self._bytes += held[1]
            held[0] += 1
            alone += held[1]
        self._entries[entry.id] = entry
        self._bytes += entry.size
        if alone > self._most_bytes:
            self.drop(entry.id)
        while self._entries and (len(self._entries) > self._most or self._bytes > self._most_bytes):
            self.drop(next(iter(self._entries)))

    def find(self, id: str, owner: str) -> Entry | None:
        """The response `id`, if it is this owner's."""
        entry = self._entries.get(id)
        return entry if entry is not None and entry.owner == owner else None

    def drop(self, id: str) -> None:
        """Forget one."""
        entry = self._entries.pop(id, None)
        if entry is None:
            return
        self._bytes -= entry.size
        for key in map(_identity, entry.counted):
            held = self._items[key]
            held[0] -= 1
            if not held[0]:
                self._bytes -= held[1]
                del self._items[key]
        entry.counted = []

    @property
    def nbytes(self) -> int:
        """The memory that all of it is taken to need."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)


_identity = id  # which is also the name of a response's


def owner_of(request: Request) -> str:
    """Whose a request is: something that tells API keys apart and is not one. Without keys all are the same."""
    told = request.scope.get(OWNER)
    return caller().secret if told is None else told
