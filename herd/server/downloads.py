"""Downloads that clients asked for: each in a thread, told to all who wait for it, ended when nobody does. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from herd.errors import HerdError
from herd.hub.pull import pull
from herd.server.errors import ApiError

__all__ = ["AT_ONCE", "Download", "Downloads"]

AT_ONCE = 2
_PLACES = threading.BoundedSemaphore(AT_ONCE)
TELL_SECONDS = 0.2
"""How often a download says how far it is."""
MOST_NOTES = 1000


class _Left(HerdError):
    """Nobody waits for the download any more. Raised inside it, wherever it tells how far it is; what has come is kept."""


class Downloads:
    """The downloads of a server. All of this is for its event loop."""

    def __init__(self) -> None:
        self._running: dict[str, Download] = {}

    @contextlib.contextmanager
    def joined(self, name: str) -> Iterator[Download]:
        """The download of `name`, which ends when all who have joined it have left. Raises ApiError (429) for one too many."""
        found = self._running.get(name)
        if found is None or found.over.done():
            found = self._running[name] = Download(name)
        found.waiting += 1
        try:
            yield found
        finally:
            found.waiting -= 1
            if not found.waiting:
                if self._running.get(name) is found:
                    del self._running[name]
                found.leave()


class Download:
    """A download and what it says: the Watch of `herd.hub.fetch`, from its threads. It begins at once.

    The server's other threads stay free, and its end does not wait for this one.
    """

    def __init__(self, name: str) -> None:
        self.waiting = 0
        self._name = name
        self._sizes: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._notes: list[str] = []
        self._left = False
        if not _PLACES.acquire(blocking=False):
            what = f"{AT_ONCE} downloads are running, which is all that may: try again later"
            raise ApiError(429, what, code="queue_full", retry_after=30)
        self._loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, name="pull", daemon=True).start()

    def leave(self) -> None:
        """Nobody waits for it."""
        self._left = True
        if not self.over.done():
            self.over.cancel()
        elif not self.over.cancelled():
            self.over.exception()  # whoever wanted to know has heard it

    def begin(self, files: list[tuple[str, int]]) -> None:
        """These come, with their sizes."""
        self._check()
        self._sizes = dict(files)

    def moved(self, name: str, done: int) -> None:
        """So many bytes of a file are there."""
        self._check()
        self._done[name] = done

    def kept(self, name: str, done: int) -> None:
        """So many were there before."""
        self._check()
        self._done[name] = done

    def note(self, text: str) -> None:
        """Something that people want to know."""
        self._check()
        if len(self._notes) < MOST_NOTES:
            self._notes.append(text)

    def _check(self) -> None:
        if self._left:
            raise _Left("nobody waits for this download")

    async def told(self) -> AsyncIterator[dict[str, Any]]:
        """What it says to one of those who wait, in Ollama's words, to the end. Raises what went wrong."""
        yield {"status": "pulling manifest"}
        shown: dict[str, int] = {}
        noted = 0
        over = False
        while not over:
            over = bool((await asyncio.wait({self.over}, timeout=TELL_SECONDS))[0])
            for text in self._notes[noted:]:
                noted += 1
                yield {"status": text}
            for name, size in self._sizes.items():
                done = self._done.get(name, 0)
                if shown.get(name) != done:
                    shown[name] = done
                    yield {"status": f"pulling {name}", "digest": name, "total": size, "completed": done}
        self.over.result()
        yield {"status": "success"}

    def _work(self) -> None:
        failed: BaseException | None = None
        try:
            pull(self._name, watch=self)
        except BaseException as error:
            failed = error
        finally:
            _PLACES.release()
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._end, failed)

    def _end(self, failed: BaseException | None) -> None:
        if not self.over.done():
            self.over.set_result(None) if failed is None else self.over.set_exception(failed)
