"""Clients that send: each its next request when the last was answered (closed loop), or all at their hour (open loop)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from herd.bench.load.client import Outcome, Target, get_json
from herd.bench.load.figures import figures
from herd.bench.load.work import Work
from herd.errors import BenchError

__all__ = ["Level", "measure", "the_model", "warm_up"]

WARM_UP = 2
"""Requests before the first level, which are not counted."""

Say = Callable[[int, int], None]
"""(requests that ended, in all; 0 in all when nobody knows)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One load. `rate` None: `clients` of them, each with one request at a time. Otherwise requests come at random moments,
    `rate` a second on average, whatever the server does; `clients` says nothing then.

    It ends after `requests`, or takes no new ones after `seconds`.
    """

    clients: int
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    seed: int = 0
    timeout: float = 600.0


async def measure(target: Target, work: Work, level: Level, say: Say = lambda done, total: None) -> dict[str, Any]:
    """The figures of one level, with the level itself. Raises BenchError when not one request could be answered."""
    outcomes: list[Outcome] = []
    bodies = work.bodies(level.seed)
    began = time.perf_counter()
    until = None if level.seconds is None else began + level.seconds

    async def one(client: int, due: float) -> None:
        outcome = Outcome(client, due)
        outcomes.append(outcome)
        path, body = next(bodies)
        await target.ask(outcome, path, body, level.timeout)
        say(sum(bool(each.ended) for each in outcomes), level.requests or 0)

    if level.rate is None:
        await _closed(one, level, until)
        clients = min(level.clients, level.requests or level.clients)
    else:
        clients = await _open(one, level, level.rate, began, until)
    found = figures(outcomes, clients=clients, began=began)
    if found["failed"] == len(outcomes):
        why = next(iter(found["errors"]), "nothing was sent")
        raise BenchError(f"{target.url} answered none of {len(outcomes)} requests: {why}")
    return {"clients": level.clients, "rate": level.rate, **found}


async def _closed(one: Callable[[int, float], Any], level: Level, until: float | None) -> None:
    left = iter(range(level.requests)) if level.requests is not None else iter(count())

    async def client(number: int) -> None:
        for _ in left:
            now = time.perf_counter()
            if until is not None and now >= until:
                return
            await one(number, now)

    await asyncio.gather(*(client(number) for number in range(level.clients)))


async def _open(one: Callable[[int, float], Any], level: Level, rate: float, began: float, until: float | None) -> int:
    """Every request is a client of its own: who is served first says nothing about the next."""
    tasks = []
    for client, after in enumerate(_arrivals(rate, level.seed)):
        due = began + after
        if client == level.requests or (until is not None and due >= until):
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(client, due)))
    await asyncio.gather(*tasks)
    return len(tasks)


def _arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds after the beginning: a Poisson process."""
    source, at = random.Random(seed), 0.0
    while True:
        at += source.expovariate(rate)
        yield at


async def the_model(target: Target) -> str:
    """The first model that a server lists. Raises BenchError when it lists none."""
    try:
        status, answer = await get_json(target, "/v1/models")
    except (OSError, ValueError, TimeoutError) as error:
        raise BenchError(f"{target.url} does not answer: {str(error) or type(error).__name__}") from None
    listed = answer.get("data") if status == 200 and isinstance(answer, dict) else None
    if listed and isinstance(listed, list) and isinstance(listed[0], dict) and "id" in listed[0]:
        return str(listed[0]["id"])
    raise BenchError(f"{target.url} does not say which models it has (status {status}): name one with --model")


async def warm_up(target: Target, work: Work, timeout: float) -> None:
    """A few short requests first: threads start, pages are read. Raises BenchError when they fail."""
    for number, (path, body) in zip(range(WARM_UP), work.bodies(-1), strict=False):
        outcome = Outcome(0, time.perf_counter())
        await target.ask(outcome, path, body | {"max_tokens": 4}, timeout)
        if outcome.error is not None and number == WARM_UP - 1:
            raise BenchError(f"{target.url} does not answer requests: {outcome.error}")
