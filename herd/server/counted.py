"""What every call is counted in, and looked up in before: metrics, rates, the reply cache. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from herd.server.caller import caller, salted
from herd.server.metrics import Metrics
from herd.server.protocol import Began, Call, Event, Finished
from herd.server.rates import Rates
from herd.server.replycache import ReplyCache
from herd.server.tracing import tracing_for

if TYPE_CHECKING:
    from herd.server.models import Launched
    from herd.server.state import State

__all__ = ["Counts", "counted"]


class Counts:
    """The counters of a server. `late()` is how many connections a deadline has ended."""

    def __init__(self, state: State) -> None:
        settings = state.settings
        self.late: Callable[[], int] = lambda: 0
        self.rates = Rates(settings.rate_requests, settings.rate_tokens, settings.max_concurrent)
        self.replies = ReplyCache(settings.reply_cache)
        self.metrics = Metrics()
        self.metrics.serve(state)
        self.tracing = tracing_for(settings)
        self.bodies = 0
        """Bytes of requests' bodies that are in memory, beyond `gate.FREE` of each."""


def counted(state: State, name: str, process: Launched, call: Call, began: float) -> AsyncGenerator[Event, None]:
    """The events of `call`, from the reply cache or else from `process`, counted in metrics and rates, and traced.

    Prompts of two API keys never share cached prefixes: the key becomes part of the call's salt here.
    """
    model = state.models.find(name)[0].spec.name
    events = _counted(state, name, model, process, call, began)
    tracing = state.counts.tracing
    return events if tracing is None else tracing.watch(name, model, call, events, began)


async def _counted(
    state: State, name: str, model: str, process: Launched, call: Call, began: float
) -> AsyncGenerator[Event, None]:
    counts, who = state.counts, caller()
    who.model = name
    owner = "" if state.settings.reply_cache_shared else who.secret
    key = counts.replies.key(call, process.about, owner)
    if key is not None:
        found = counts.replies.get(key, call.id)
        outcome = "miss" if found is None else "hit"
        counts.metrics.cache(model, outcome)
        if who.headers.setdefault("X-Herd-Cache", outcome) != outcome:  # one of several prompts
            who.headers["X-Herd-Cache"] = "partial"
        if found is not None:
            for event in found:
                yield event
            return
    events = counts.metrics.watch(model, process.run(replace(call, salt=salted(call.salt))), began)
    if key is not None:
        events = counts.replies.keep(key, events)
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Began):
                counts.rates.spend(who.account, event.prompt_tokens)
            elif isinstance(event, Finished):
                counts.rates.spend(who.account, event.usage.completion_tokens)
            yield event
