"""One writer in a run's folder.

The lock belongs to the process and ends with it, kill -9 included; processes forked by it (workers that load data) do not hold
it. It says who holds it. Where the file system has no locks, that is told and the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from herd.errors import CheckpointError, ConfigError

__all__ = ["LOCK", "alone", "check_free"]

LOCK = "lock"
"""Name of the file in a run's folder."""

_held: set[Path] = set()
"""Folders that this process writes: the system's locks are per process and would let a second run of it in."""

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def alone(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold `folder` (made when missing) as its only writer. Raises ConfigError naming the other run, if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if place in _held:
        raise ConfigError(f"{folder}: another run of this process writes there: choose another `out`")
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o664)
    _held.add(place)
    try:
        try:
            _take(descriptor)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"{folder}: another run is writing there ({_holder(descriptor)}): wait for it, stop it, or choose another `out`"
            ) from None
        except OSError as error:
            tell(
                f"{folder}: this file system has no locks ({error.strerror}): take care that no second run writes there"
            )
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds, though it cannot say for whom
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(who).encode(), 0)
        yield
    finally:
        _held.discard(place)
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raise what `alone` would, and CheckpointError where nothing can be written, without making `folder`.

    For the beginning of a run, long before it takes its folder: another run may still take it in between. A full disk is let
    pass: the run says what it needs.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".herd-", dir=there):
            pass
        if (folder / LOCK).exists():
            with alone(folder, lambda text: None):
                pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return
        raise CheckpointError(f"cannot be written: {error.strerror or error}", path=folder) from error


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"
