"""The HTTP side of one worker: started, listened to, asked, stopped. One asyncio loop; no torch.

Abandoning the iterator of `run` cancels its call in the worker, at any moment. When the worker dies, everyone who waits for
something of it gets a `WorkerError` that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from herd.errors import HerdError
from herd.server.protocol import (
    DOWN,
    UP,
    Answer,
    Ask,
    Beat,
    Broken,
    Call,
    Cancel,
    Event,
    Failed,
    Finished,
    Gone,
    Load,
    Progress,
    Ready,
)
from herd.server.settings import ModelSpec
from herd.server.wire import HEADER, split_header

__all__ = ["Process", "WorkerError"]

log = logging.getLogger("herd.server")
LONG = 1 << 16
"""Bytes of a frame from which on it is read in a thread: a megabyte of log-probabilities takes an eighth of a second."""
STOP_SECONDS = 5.0
"""What a worker gets to end after its socket was closed, before it is killed."""


class WorkerError(HerdError):
    """Something a worker could not do. `kind` names the HerdError that it raised, or is "Bug", "Crashed" or "Stopped"."""

    def __init__(self, message: str, *, kind: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.details = details or {}


class Process:
    """The worker of `spec`. `start` it once; `ready` waits until the model is loaded."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.progress = Progress("waiting")
        self.about: Ready | None = None
        self.stats: dict[str, Any] = {}
        self.error: WorkerError | None = None
        """Why it cannot be used: it could not load the model, crashed, or was stopped."""
        self._loaded = asyncio.Event()
        self._calls: dict[str, asyncio.Queue[Event | WorkerError]] = {}
        self._asks: dict[str, asyncio.Future[Any]] = {}
        self._leaving: set[str] = set()
        """Calls and questions that were left here and that the worker still has its hands on."""
        self._turn = asyncio.Lock()
        self._numbers = itertools.count()
        self._child: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the process and tell it what to load. Raises WorkerError when none can be started."""
        ours, theirs = socket.socketpair()
        try:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "herd.server.worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=1 << 20,
                start_new_session=True,  # a Ctrl-C in the terminal is for the server, which lets replies end
            )
        except OSError as error:
            ours.close()
            self._fail(WorkerError(f"no process can be started for {self.spec.name}: {error}", kind="Bug"))
            assert self.error is not None
            raise self.error from None
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(Load(self.spec.source, self.spec.options.arguments(), self.spec.loras))
        for work in (self._listen(reader), self._hear(), self._watch()):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def ready(self) -> Ready:
        """The loaded model. Raises WorkerError when it cannot be loaded."""
        await self._loaded.wait()
        if self.error is not None:
            raise self.error
        assert self.about is not None
        return self.about

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a call, up to Finished. Raises WorkerError for Failed, and when the worker dies."""
        self._check()
        found: asyncio.Queue[Event | WorkerError] = asyncio.Queue()
        self._calls[call.id] = found
        over, sent = False, [False]
        try:
            await self._put(call, sent)
            while not over:
                event = await found.get()
                if isinstance(event, WorkerError):
                    over = True
                    raise event
                if isinstance(event, Failed):
                    over = True
                    raise WorkerError(event.message, kind=event.kind, details=event.details)
                over = isinstance(event, Finished)
                yield event
        finally:
            self._calls.pop(call.id, None)
            if sent[0] and not over:
                self._leave(call.id)

    async def ask(self, what: str, **args: Any) -> Any:
        """The answer to a question of `herd.server.asks`. Raises WorkerError."""
        self._check()
        id = f"ask {next(self._numbers)}"
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asks[id] = future
        sent = [False]
        try:
            await self._put(Ask(id, what, args), sent)
            return await future
        finally:
            self._asks.pop(id, None)
            if sent[0] and (not future.done() or future.cancelled()):
                self._leave(id)
            elif future.done() and not future.cancelled():
                future.exception()  # it is told by what is raised here

    @property
    def pid(self) -> int | None:
        """The worker's process id, while it lives."""
        return None if self._child is None or self._child.returncode is not None else self._child.pid

    @property
    def calls(self) -> int:
        """Calls and questions that have not ended, and those that were left as long as the worker is busy with them."""
        return len(self._calls) + len(self._asks) + len(self._leaving)

    def memory(self) -> int | None:
        """Bytes of memory that the worker takes now, measured; None when it is gone or the system does not say."""
        if self.pid is None:
            return None
        try:
            fields = Path(f"/proc/{self.pid}/statm").read_text().split()
            return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            return None

    async def stop(self, why: str = "the model was unloaded") -> None:
        """End the process; what it was doing fails with `why`. Its memory is free when this returns."""
        self._fail(WorkerError(why, kind="Stopped"))
        if self._writer is not None:
            self._writer.transport.abort()  # and not close, which would wait for what was not sent yet
        if self._child is not None:
            try:
                await asyncio.wait_for(self._child.wait(), STOP_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._child.kill()
                await self._child.wait()
        for task in list(self._tasks):
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _send(self, message: Any) -> None:
        if self._writer is not None and not self._writer.is_closing():
            for data in DOWN.frames([message], _too_large):
                self._writer.write(data)

    async def _put(self, message: Any, sent: list[bool]) -> None:
        """Send a call or question when the worker has read what was sent before: no more than one at a time waits as bytes.
        `sent` tells, also when this is cancelled, whether the worker will see it. Raises WorkerError."""
        async with self._turn:
            self._check()
            self._send(message)
            sent[0] = True
            if self._writer is not None:
                with contextlib.suppress(ConnectionError):  # `_watch` says how it ended
                    await self._writer.drain()

    def _leave(self, id: str) -> None:
        if self.error is None:
            self._leaving.add(id)
            self._send(Cancel(id))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                data = await reader.readexactly(split_header(await reader.readexactly(HEADER)))
                # What reads a long one takes turns with the event loop.
                messages = UP.decode(data) if len(data) <= LONG else await asyncio.to_thread(UP.decode, data)
                for message in messages:
                    self._take(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except Exception as error:  # a frame that makes no sense: there is no telling what the next bytes are
            log.error("%s: what its process says cannot be read (%s)", self.spec.name, type(error).__name__)
            self._fail(WorkerError(f"what the process of {self.spec.name} says cannot be read", kind="Crashed"))
            if self._writer is not None:
                self._writer.transport.abort()  # the worker ends with its socket

    def _take(self, message: Any) -> None:
        match message:
            case Progress():
                self.progress = message
            case Ready():
                self.about, self.progress = message, Progress("ready", 1.0)
                self._loaded.set()
            case Broken():
                if self._loaded.is_set():
                    log.error("%s: %s", self.spec.name, message.message)
                self._fail(WorkerError(message.message, kind=message.kind))
            case Beat():
                self.stats = message.stats
            case Gone():
                self._leaving.discard(message.call)
            case Answer():
                future = self._asks.get(message.call)
                if future is not None and not future.done():
                    future.set_result(message.value)
            case Failed() if message.call in self._asks:
                future = self._asks[message.call]
                if not future.done():
                    future.set_exception(WorkerError(message.message, kind=message.kind, details=message.details))
            case _:
                found = self._calls.get(message.call)
                if found is not None:
                    found.put_nowait(message)

    async def _hear(self) -> None:
        """What the worker prints goes to the log."""
        assert self._child is not None
        assert self._child.stdout is not None
        while True:
            try:
                line = await self._child.stdout.readline()
            except ValueError:  # a line beyond the limit: what is left of it comes as the next
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            log.info("%s: %s", self.spec.name, text)

    async def _watch(self) -> None:
        assert self._child is not None
        status = await self._child.wait()
        how = f"signal {signal.Signals(-status).name}" if -status in _SIGNALS else f"status {status}"
        if self.error is None:  # what it said last can be anybody's text: it is in the log, and in no client's answer
            log.error("the process of %s has ended with %s", self.spec.name, how)
        self._fail(WorkerError(f"the process of {self.spec.name} has ended with {how}", kind="Crashed"))
        if self._writer is not None:
            self._writer.close()

    def _fail(self, error: WorkerError) -> None:
        """From now on there is nothing but `error`."""
        if self.error is not None:
            return
        self.error = error
        self._leaving.clear()
        self._loaded.set()
        for found in list(self._calls.values()):
            found.put_nowait(error)
        for future in list(self._asks.values()):
            if not future.done():
                future.set_exception(error)


def _too_large(message: Any, size: int) -> Any:
    raise WorkerError(f"the request is larger than a model takes ({size:,} bytes)", kind="ConfigError")


_SIGNALS: Sequence[int] = [int(one) for one in signal.Signals]
