"""One writer per file, across processes and tools.

The locks are advisory ones on small files beside the cache, the same files and the same system call that huggingface_hub uses.
Where the file system has no locks they cost nothing and give nothing: what is written is checked before it gets its name.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["locked"]

POLL = 0.1
"""Seconds between two tries for a lock that somebody else holds."""
PATIENCE = 3.0
"""Seconds of waiting before that is said."""


@contextlib.contextmanager
def locked(file: Path, pause: Callable[[float], None], waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock `file` (made when missing, left in place). `pause(seconds)` is called between tries and may raise.

    `waiting` is called once when the lock is still taken after PATIENCE seconds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o664)
    try:
        start, said = time.monotonic(), False
        while not _try(descriptor):
            if not said and time.monotonic() - start > PATIENCE:
                said = True
                waiting()
            pause(POLL)
        yield
    finally:
        os.close(descriptor)  # gives the lock back, too


if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _try(descriptor: int) -> bool:
    """Takes the lock if it is free. True also where the file system has no locks."""
    try:
        _take(descriptor)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: some network file systems
        return True
    return True
