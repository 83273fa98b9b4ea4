"""/health beside hard work, held to what the event loop does between a question and its answer."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence

import httpx

from tests.server.conftest import Live

HEALTH_SECONDS = 0.05
"""Half the bar of 0.1 s at the 99th percentile, in seconds of a core that the event loop uses: time that the machine gave to
others is no fault of the server. A body of 16 MB that is parsed and decoded in the loop takes 0.07 to 0.1."""


def held_to_the_bar(
    live: Live, works: Sequence[Callable[[httpx.Client], int]], *, asked: int, answered: int
) -> set[int]:
    """Ask at least `asked` times while each of `works` is done again and again, together `answered` times or more; the statuses
    that they gave."""
    done, statuses = threading.Event(), []

    def again(work: Callable[[httpx.Client], int]) -> None:
        with live.client() as client:
            while not done.is_set():
                statuses.append(work(client))

    threads = [threading.Thread(target=again, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    taken, clock = [], live.clock()
    try:
        with live.client() as client:
            while len(taken) < asked or len(statuses) < answered:
                began = clock()
                assert client.get("/health").status_code in (200, 503)
                taken.append(clock() - began)
                time.sleep(0.01)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert statistics.quantiles(taken, n=100, method="inclusive")[98] < HEALTH_SECONDS
    return set(statuses)
