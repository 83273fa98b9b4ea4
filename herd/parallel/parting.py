"""What is left to do when ranks need each other no more: the main one does it, the others stay until it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from herd.errors import RanksError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from herd.parallel.mesh import Mesh

__all__ = ["main_alone"]

KEY, LEFT = "herd/alone", "herd/left"
DONE, FAILED = "done", "failed"
PAUSE, LONGEST_PAUSE = 0.02, 5.0
"""Seconds between two looks, doubled each time: thousands of ranks ask one process."""
PATIENCE = 60.0
"""Seconds that the main rank waits until the others have seen the end: it may be their store's home."""


@contextlib.contextmanager
def main_alone(mesh: Mesh) -> Iterator[None]:
    """Leave the process group; the block is for the main rank, and the others, whose block is empty, stay until it is done.

    Launchers take ranks that have ended for a run that is over, and end what is left: torchrun after 5 minutes, `spawn` when the
    next group cannot be joined. So they stay, and nothing is exchanged but one word over the store that the group was made with.
    However long the block takes, no collective runs into its timeout. Raises RanksError on the others when the block failed or
    the main rank is gone.
    """
    if mesh.world == 1:
        yield
        return
    store = _get_default_store()
    dist.destroy_process_group()
    if not mesh.is_main:
        yield
        _stay(store)
        return
    said = FAILED
    try:
        yield
        said = DONE
    finally:
        with contextlib.suppress(dist.DistError):  # nobody is left who would read it
            store.set(KEY, said)
            until = time.monotonic() + PATIENCE
            while store.add(LEFT, 0) < mesh.world - 1 and time.monotonic() < until:
                time.sleep(PAUSE)


def _stay(store: Store) -> None:
    pause = PAUSE
    try:
        while not store.check([KEY]):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        said = store.get(KEY).decode()
        store.add(LEFT, 1)
    except dist.DistError as error:
        raise RanksError("the main rank is gone before its work was done; what it printed says why") from error
    if said != DONE:
        raise RanksError("the main rank could not do what was left to do; what it printed says why")
