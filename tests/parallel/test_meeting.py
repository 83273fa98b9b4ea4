"""Ranks that are started together get one name, whatever earlier starts left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Event

import pytest
import torch.distributed as dist

from herd.errors import ConfigError
from herd.parallel.meeting import agree

LONG, SHORT = timedelta(minutes=5), timedelta(seconds=0.1)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(server: dist.TCPStore, timeout: timedelta = LONG) -> dist.TCPStore:
    """Each rank has a connection of its own."""
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)


@pytest.mark.parametrize("late", [None, 0, 2])
def test_every_start_has_a_name_of_its_own(server: dist.TCPStore, late: int | None) -> None:
    """Also where one rank comes when the others have long looked at what the start before left for them, and in another size."""
    seen = []
    for world in (3, 3, 2, 4):
        come = Event()

        def rank(number: int, world: int = world, come: Event = come) -> str:
            if number == late:
                come.wait()
            return agree(client(server), number, world, LONG)

        with ThreadPoolExecutor(world) as pool:
            found = [pool.submit(rank, number) for number in range(world)]
            try:
                if late is not None and late < world:
                    with pytest.raises(TimeoutError):  # nobody takes what is old for what is new
                        found[0 if late else 1].result(timeout=0.2)
            finally:
                come.set()
            names = {future.result() for future in found}
        assert len(names) == 1
        seen += names
    assert len(set(seen)) == 4


def test_a_rank_that_ended_before_it_was_answered_is_no_obstacle(server: dist.TCPStore) -> None:
    """Its number stays in the store; the next start answers the new one, too."""
    client(server).set("herd/says/1", "0123")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(agree, client(server), 0, 2, LONG)
        while not server.check(["herd/told/1"]):
            pass
        second = pool.submit(agree, client(server), 1, 2, LONG)
        assert first.result() == second.result()


def test_nobody_waits_for_ever(server: dist.TCPStore) -> None:
    store = client(server)
    for rank in range(2):
        store.set(f"herd/says/{rank}", "0123")
        store.set(f"herd/told/{rank}", "0123 4567")
    with pytest.raises(ConfigError, match=r"waited 0:00:00\.100000 for rank 0, which gave rank 1 no answer"):
        agree(store, 1, 2, SHORT)
    with pytest.raises(ConfigError, match=r"waited 0:00:00\.100000 for all 1 other ranks"):
        agree(store, 0, 2, SHORT)
