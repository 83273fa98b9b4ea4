"""A name for each start of a group of ranks, agreed on over a store that outlives them.

torchrun keeps one store for all its restarts, and what the ranks of an earlier start wrote stays in it: a rank that is quicker
than the others would read their old addresses and call processes that are dead. So each start gets names of its own there. The
number of the restart is none: on several machines, only the one whose rank died counts it.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from herd.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["agree"]

PAUSE = 0.05
"""Seconds between two looks. Each rank looks at one short entry of its own."""


def agree(store: Store, rank: int, world: int, patience: timedelta) -> str:
    """A name that all `world` ranks of this start get and that no earlier one had, whatever earlier ones left in `store`.

    Every rank says a number that nobody else says; rank 0 answers each with that number and its own, which becomes the name. An
    answer to another number is of an earlier start. Raises ConfigError when the others do not come within `patience`.
    """
    mine = uuid4().hex
    store.set(f"herd/says/{rank}", mine)
    until = time.monotonic() + patience.total_seconds()
    answered: dict[int, str] = {}
    while True:
        if rank:
            number, name = _said(store, f"herd/told/{rank}").split() or ("", "")
            if number == mine:
                store.add(f"herd/met/{name}", 1)
                return name
        else:
            for other in range(1, world):
                said = _said(store, f"herd/says/{other}")
                if said and answered.get(other) != said:
                    store.set(f"herd/told/{other}", f"{said} {mine}")
                    answered[other] = said
            if store.add(f"herd/met/{mine}", 0) == world - 1:
                return mine
        if time.monotonic() > until:
            whom = f"rank 0, which gave rank {rank} no answer" if rank else f"all {world - 1} other ranks"
            raise ConfigError(f"waited {patience} for {whom}: look what became of them")
        time.sleep(PAUSE)


def _said(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""  # `get` alone would wait for it
