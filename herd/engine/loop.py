"""An engine that steps in a thread of its own while there is work, for callers in any other thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from herd.engine.engine import Engine
from herd.engine.request import Request, TokenEvent
from herd.errors import HerdError

__all__ = ["Loop", "Sink"]

T = TypeVar("T")


class Sink(Protocol):
    """Where the events of one request go, in the engine's thread: be quick, and wait for nobody."""

    def push(self, event: TokenEvent) -> bool:
        """Take an event. True: this continuation is complete, whatever the engine thinks (a stop string)."""
        ...

    def fail(self, error: BaseException) -> None:
        """There will be no more events: the engine is gone, or `push` raised."""
        ...


class Loop:
    """Steps `engine` in a thread that begins with the first request and sleeps when there is none.

    A step that raises is a bug: every request is told, and none is taken any more.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sinks: dict[str, tuple[Sink, set[int]]] = {}
        self._between: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._broken: BaseException | None = None
        self.after: Callable[[], None] = lambda: None
        """Called in the engine's thread when the events of a step have been passed on."""

    def start(self) -> None:
        """Begin the thread now, with the priority of the one that calls this: otherwise the first request's thread begins it."""
        with self._wake:
            self._check()
            self._go()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request. Raises what `Engine.add` raises, HerdError when the loop has ended."""
        with self._wake:
            self._check()
            if request.id not in self._sinks:
                self.engine.add(request)  # raises before anything is registered; the thread waits for the lock
                self._sinks[request.id] = sink, set(range(request.width))
            else:
                self.engine.add(request)  # says that the id is in use
            self._go()

    def between(self, task: Callable[[], T]) -> T:
        """What `task` returns or raises, run in the engine's thread between two steps: for what looks into pool and cache.

        Not to be called in that thread. Raises HerdError when the loop has ended.
        """
        done: Future[T] = Future()
        with self._wake:
            self._check()
            self._between.append((task, done))
            self._go()
        return done.result()

    def _check(self) -> None:
        if self._closing:
            raise HerdError("this model has been closed: open it again")
        if self._broken is not None:
            raise HerdError(f"the engine has stopped after an error: {self._broken}") from self._broken

    def _go(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="herd-engine", daemon=True)
            self._thread.start()
        self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request; its sink gets the last events. Unknown and finished ids are fine."""
        with self._wake:
            self.engine.abort(request_id)
            self._wake.notify()

    def close(self) -> None:
        """End every request and the thread. Calling it again does nothing."""
        with self._wake:
            self._closing = True
            for request_id in self._sinks:
                self.engine.abort(request_id)
            self._wake.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self.engine.busy and not self._between and not self._closing:
                        self._wake.wait()
                    if self._closing and not self.engine.busy and not self._between:
                        return
                    tasks, self._between = self._between, []
                for task, done in tasks:
                    try:
                        done.set_result(task())
                    except Exception as error:
                        done.set_exception(error)
                self._pass_on(self.engine.step())
                self.after()
        except BaseException as error:
            with self._wake:
                self._broken = error
                sinks, self._sinks = self._sinks, {}
                tasks, self._between = self._between, []
            for sink, _ in sinks.values():
                with contextlib.suppress(Exception):
                    sink.fail(error)
            with contextlib.suppress(Exception):
                self.after()
            for _, done in tasks:
                done.set_exception(HerdError(f"the engine has stopped after an error: {error}"))
            if not isinstance(error, Exception):
                raise

    def _pass_on(self, events: list[TokenEvent]) -> None:
        for event in events:
            with self._wake:
                entry = self._sinks.get(event.request_id)
            if entry is None:
                continue
            sink, left = entry
            try:
                complete = sink.push(event)
            except Exception as error:
                with self._wake:
                    del self._sinks[event.request_id]
                self.engine.abort(event.request_id)
                with contextlib.suppress(Exception):
                    sink.fail(error)
                continue
            if event.finish is not None:
                left.discard(event.index)
            elif complete:
                self.engine.stop(event.request_id, event.index)
            if not left:
                with self._wake:
                    self._sinks.pop(event.request_id, None)
