"""Several downloads at once: the first failure, or Ctrl-C, ends all of them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from herd.hub.web import Stopped

__all__ = ["in_threads"]

T = TypeVar("T")

GRACE = 1.0
"""Seconds for all threads to come to an end by themselves."""


def in_threads(things: Sequence[T], jobs: int, work: Callable[[T, threading.Event], None]) -> None:
    """Do `work(thing, stop)` on all `things`, `jobs` at once, in their order. The first failure is raised; it sets `stop`.

    Threads are daemons: one that waits for a dead connection does not keep the program alive.
    """
    waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
    for thing in things:
        waiting.put(thing)
    stop = threading.Event()
    failures: list[BaseException] = []

    def labour() -> None:
        while not stop.is_set():
            try:
                thing = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                work(thing, stop)
            except Stopped:
                return
            except BaseException as failure:
                failures.append(failure)
                stop.set()

    threads = [threading.Thread(target=labour, daemon=True) for _ in range(max(1, min(jobs, len(things))))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # with a timeout, so that Ctrl-C is heard
                if stop.is_set():
                    break
    finally:
        stop.set()
        deadline = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]
