"""Replies that were given before, for requests that must get the same again. Off unless it is given memory. No torch.

Kept are replies of greedy requests and of those with a seed, by everything that can change them: the model's fingerprint, the
prompt and tools as they came, every sampling field, the day (prompts may hold it), and the API key, unless keys share.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import asdict, replace
from hashlib import sha256

from herd.server.protocol import UP, Call, Ended, Event, Finished, Ready

__all__ = ["ReplyCache"]

LARGEST_SHARE = 0.25
"""Most of the cache that one reply may take."""
OVERHEAD = 512
"""Bytes that an entry takes beside its events."""


class ReplyCache:
    """Up to `size` bytes of replies; those that were not asked for the longest leave first."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self._entries: OrderedDict[str, bytes] = OrderedDict()

    def key(self, call: Call, about: Ready | None, owner: str) -> str | None:
        """What the reply to `call` is kept under for `owner`; None when it may differ each time.

        Replies of adapters are not kept: one can be loaded again under its name with other weights.
        """
        sampling = call.sampling
        fixed = sampling.get("temperature") == 0 or sampling.get("seed") is not None
        if not self.size or about is None or call.adapter is not None or not fixed:
            return None
        content = asdict(replace(call, id=""))
        told = [about.source, about.fingerprint, owner, time.strftime("%Y-%m-%d"), type(call.prompt).__name__, content]
        return sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def get(self, key: str, call: str) -> list[Event] | None:
        """The events of a reply, as those of `call`. Its times are zero: nothing was computed."""
        data = self._entries.get(key)
        if data is None:
            return None
        self._entries.move_to_end(key)
        events: list[Event] = []
        for event in UP.decode(data):
            if isinstance(event, Finished):
                usage = replace(event.usage, prompt_seconds=0.0, decode_seconds=0.0, from_cache=True)
                event = replace(event, usage=usage)
            events.append(replace(event, call=call))
        return events

    async def keep(self, key: str, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """`events`; when they are complete they are kept."""
        seen: list[Event] = []
        async for event in events:
            seen.append(event)
            yield event
        whole = isinstance(seen[-1], Finished) if seen else False
        if whole and not any(isinstance(event, Ended) and event.detail == "abort" for event in seen):
            self._put(key, UP.encode(seen))

    def _put(self, key: str, data: bytes) -> None:
        taken = len(data) + OVERHEAD
        if taken > self.size * LARGEST_SHARE:
            return
        old = self._entries.pop(key, None)
        self.used += taken - (0 if old is None else len(old) + OVERHEAD)
        self._entries[key] = data
        while self.used > self.size:
            _, gone = self._entries.popitem(last=False)
            self.used -= len(gone) + OVERHEAD
