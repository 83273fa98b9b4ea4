"""What every router gets: `state_of(request)`. `State.run` is the one way from a call to its events. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request

from herd.errors import HerdError
from herd.server.caller import caller
from herd.server.counted import Counts, counted
from herd.server.downloads import Downloads
from herd.server.errors import ApiError
from herd.server.fetching import Fetcher
from herd.server.models import Models
from herd.server.process import WorkerError
from herd.server.protocol import Began, Call, Chat, Event, Ready
from herd.server.providers.remote import Providers
from herd.server.settings import ServerSettings
from herd.server.stored import Stored

__all__ = ["Running", "State", "begun", "new_id", "state_of", "until_stopped"]

log = logging.getLogger("herd.server")
T = TypeVar("T")


class State:
    """The settings, the models, and what runs."""

    def __init__(self, settings: ServerSettings, models: Models) -> None:
        self.settings, self.models = settings, models
        self.started = time.time()
        self.stored = Stored()
        self.draining = False
        """Whether new requests are refused. Those that were taken on before may do all that they have to do."""
        self.over = False
        """Whether nothing more is done for anybody."""
        self.visits = 0
        """Requests that were taken on and have no whole answer yet, but for those that only read."""
        self.downloads = Downloads()
        self.running: set[Running] = set()
        """Calls that have not ended."""
        self._asking: set[Running] = set()
        """Questions that have no answer."""
        self.counts = Counts(self)
        self.providers = Providers(settings)
        self.fetcher = Fetcher() if settings.fetch_images else None
        """What opens addresses of images; None: nothing does."""

    async def run(self, name: str, call: Call) -> AsyncGenerator[Event, None]:
        """The events of `call` from the model that clients call `name`, from Began to Finished.

        Closing the iterator (`contextlib.aclosing`) ends the call in the engine at once. Raises ApiError when the server drains
        or the queue is full, UnknownModelError, and WorkerError for what is wrong with the call or the model; before Began, or
        later.
        """
        await self.models.meet(name)
        self._admit(name)
        running = Running(name, call.id)
        self.running.add(running)
        try:
            async with self.models.use(name) as (slot, process, adapter):
                if adapter is not None:
                    call = replace(call, adapter=adapter)
                if isinstance(call.prompt, Chat):
                    call = replace(call, prompt=slot.spec.opened(call.prompt))
                async with contextlib.aclosing(counted(self, name, process, call, running.began)) as events:
                    async for event in until_stopped(events, running):
                        yield event
        finally:
            self.running.discard(running)

    async def ask(self, name: str, what: str, *, adapted: bool = False, **args: Any) -> Any:
        """The answer of the model that clients call `name` to a question of `herd.server.asks`. Raises as `run`.

        `adapted`: the question has an argument `adapter`, which is the one that `name` means.
        """
        await self.models.meet(name)
        self._admit(name)
        running = Running(name, what)
        self._asking.add(running)
        try:
            async with self.models.use(name) as (_, process, adapter):
                asking = asyncio.ensure_future(process.ask(what, **({**args, "adapter": adapter} if adapted else args)))
                try:
                    await asyncio.wait({asking, running.stopped}, return_when=asyncio.FIRST_COMPLETED)
                    if not asking.done():
                        running.check()
                    return asking.result()
                finally:
                    if not asking.done():
                        asking.cancel()
                        with contextlib.suppress(asyncio.CancelledError, HerdError):
                            await asking
        finally:
            self._asking.discard(running)

    async def about(self, name: str) -> Ready:
        """Facts of a model, which is loaded for that. Raises as `run`."""
        async with self.models.use(name) as (slot, process, adapter):
            about = await process.ready()
            return replace(about, context=slot.context(adapter) or about.context)

    def stop_all(self, why: str) -> None:
        """End every call with an error: the server does not wait for them any more. Nothing begins after that."""
        self.over = self.draining = True
        for running in [*self.running, *self._asking]:
            running.stop(why)

    def check_open(self) -> None:
        """Raise ApiError (503) when the server ends and this is nothing that it has taken on."""
        if self.over or (self.draining and not caller().admitted):
            raise ApiError(503, "the server is shutting down: try another one", code="shutting_down", retry_after=5)

    def _admit(self, name: str) -> None:
        """Raise why nothing more is taken for the model `name`."""
        self.check_open()
        slot, _ = self.models.find(name)
        most = self.settings.max_queue + (slot.about.seqs if slot.about is not None else slot.spec.options.max_seqs)
        # Those that clients have left count until the worker lets go of them.
        users = slot.users if slot.process is None else max(slot.users, slot.process.calls)
        if users >= most:
            raise ApiError(
                429,
                f"{users} requests are running or waiting for {slot.spec.name}, which is all that may: try again later",
                code="queue_full",
                retry_after=self._retry_after(users),
            )

    def _retry_after(self, waiting: int) -> float:
        return min(60.0, 1.0 + waiting / 16)


class Running:
    """A call that runs."""

    def __init__(self, name: str, id: str) -> None:
        self.name, self.id = name, id
        self.began = time.monotonic()
        self.stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting: asyncio.Timeout | None = None
        """Around what is waited for now: it ends when the call is stopped."""

    def stop(self, why: str) -> None:
        """End it with an error."""
        if not self.stopped.done():
            self.stopped.set_result(why)
            if self.waiting is not None:
                self.waiting.reschedule(0)

    def check(self) -> None:
        """Raise WorkerError when it was stopped."""
        if self.stopped.done():
            raise WorkerError(self.stopped.result(), kind="Stopped")


async def until_stopped(events: AsyncGenerator[T, None], running: Running) -> AsyncGenerator[T, None]:
    """`events`, until the call is stopped from outside. Raises WorkerError then.

    There is no task for each event: making one takes longer than all else that is done with it.
    """
    while True:
        running.check()
        try:
            async with asyncio.timeout(None) as running.waiting:
                event = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError:
            running.check()
            raise
        finally:
            running.waiting = None
        yield event


async def begun(events: AsyncGenerator[Event, None]) -> Began:
    """The first event of a call, which says that it was taken. Raises what is wrong with it."""
    first = await anext(events)
    assert isinstance(first, Began)
    return first


def state_of(request: Request) -> State:
    """The server's state."""
    return request.app.state.herd


def new_id(prefix: str) -> str:
    """An id that nobody guesses: `chatcmpl-...`."""
    return f"{prefix}{secrets.token_hex(12)}"
