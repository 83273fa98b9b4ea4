"""Which models there are, which are loaded, and when they are unloaded. One asyncio loop; no torch.

A model is loaded when it is first asked for (or when the server starts), each in a process of its own; unloading ends the
process, so its memory is really given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from herd.errors import UnknownModelError
from herd.hub.found import Found
from herd.server.errors import ApiError
from herd.server.here import here, pathless, spec_of
from herd.server.process import Process, WorkerError
from herd.server.protocol import Call, Event, Progress, Ready
from herd.server.settings import ModelSpec, ServerSettings

__all__ = ["Launched", "Models", "Slot"]

log = logging.getLogger("herd.server")
IDLE_LOOK_SECONDS = 1.0
LISTED = 1000
"""Characters of names in a refusal."""
LOOK_SECONDS = 1.0
"""How long a list of what is on this machine is believed."""
MOST_SPELLED = 1000
"""Spellings of names by clients that are remembered. A name has any number of them."""
RETRY_SECONDS = 10.0
"""A model that could not be loaded is not tried again before."""


class Launched(Protocol):
    """What stands behind a model: a worker process, a remote provider, or a test double. See `Process`."""

    progress: Progress
    about: Ready | None
    stats: dict[str, Any]
    error: WorkerError | None

    async def start(self) -> None: ...

    async def ready(self) -> Ready: ...

    def run(self, call: Call) -> AsyncGenerator[Event, None]: ...

    async def ask(self, what: str, **args: Any) -> Any: ...

    def memory(self) -> int | None: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def calls(self) -> int: ...

    async def stop(self, why: str = ...) -> None: ...


Launch = Callable[[ModelSpec], Launched]


@dataclass(slots=True)
class Slot:
    """A model and what runs it now, if anything. `users` are requests that hold it; `used` is when one last did."""

    spec: ModelSpec
    adapters: dict[str, str] = field(default_factory=dict)
    process: Launched | None = None
    users: int = 0
    used: float = 0.0
    loaded_at: float | None = None
    failed_at: float = 0.0
    keep_alive: float | None = None
    """Idle seconds after which it is unloaded; None: never. Requests of Ollama's API change it until it is unloaded."""
    let_go: bool = False
    """Whether it was unloaded because nobody needs it now."""
    created: int = 0
    changed: tuple[int, dict[str, int]] | None = None
    """The contexts of the model and of its adapters (`Ready.context`, `Ready.rooms`) since adapters came or went."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def state(self) -> str:
        """unloaded, loading, ready or failed."""
        if self.process is None:
            return "unloaded"
        if self.process.error is not None:
            return "failed"
        return "loading" if self.process.about is None else "ready"

    @property
    def about(self) -> Ready | None:
        """Facts of the loaded model."""
        return self.process.about if self.process is not None and self.process.error is None else None

    def context(self, adapter: str | None = None) -> int | None:
        """The most tokens of a request with `adapter`; None while the model is not loaded."""
        if (about := self.about) is None:
            return None
        whole, rooms = self.changed or (about.context, about.rooms)
        return whole if adapter is None else rooms.get(adapter, whole)


class Models:
    """All models of a server. `launch` makes what runs one (tests give a double)."""

    def __init__(self, settings: ServerSettings, launch: Launch = Process) -> None:
        self.settings = settings
        self._launch = launch
        self.slots: dict[str, Slot] = {}
        """By the model's own name, in the order in which they were named."""
        for spec in settings.models:
            self.add(spec)
        self._room, self._looking = asyncio.Lock(), asyncio.Lock()
        self._here: list[Found] = []
        self._looked: float | None = None
        self._spelled: OrderedDict[str, str] = OrderedDict()
        """Other spellings of models that nobody named, as clients wrote them -> the model's own name."""
        self._tasks: set[asyncio.Task[Any]] = set()

    def add(self, spec: ModelSpec) -> Slot:
        """Make a model known."""
        slot = Slot(spec, dict(spec.adapters), keep_alive=spec.keep_alive, created=int(time.time()))
        self.slots[spec.name] = slot
        return slot

    async def start(self) -> None:
        """Begin to load the models that were named, one after another, and to look after idle ones."""
        self._go(self._unload_idle())
        if not self.settings.lazy:
            self._go(self._load_named())

    async def close(self) -> None:
        """Unload everything."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self.unload(name, "the server is shutting down") for name in list(self.slots)))

    def names(self) -> list[tuple[str, Slot, str | None]]:
        """Everything that clients can ask for: (name, slot, adapter)."""
        out: list[tuple[str, Slot, str | None]] = []
        for slot in self.slots.values():
            out += [(name, slot, None) for name in (slot.spec.name, *slot.spec.aliases)]
            out += [(name, slot, name) for name in slot.adapters]
        return out

    async def meet(self, name: str) -> None:
        """Look for `name` among the models of this machine, when clients may ask for those: `find` knows it then.

        The disk is read in a thread, by one at a time.
        """
        if not self.settings.any_model or self.settings.provider_of(name) is not None or self.known(name) is not None:
            return
        async with self._looking:
            if self.known(name) is not None:
                return
            now = time.monotonic()
            if self._looked is None or now - self._looked >= LOOK_SECONDS:
                self._here = await asyncio.to_thread(lambda: list(here()))
                self._looked = time.monotonic()
            spec = await asyncio.to_thread(spec_of, name, self.settings, self._here)
            if spec is None:
                return
            slot = self._same(spec) or self.add(spec)
            if name not in (slot.spec.name, *slot.spec.aliases):
                self._spelled[name] = slot.spec.name
                while len(self._spelled) > MOST_SPELLED:
                    self._spelled.popitem(last=False)

    def look_again(self) -> None:
        """There are other models on this machine now."""
        self._looked = None

    def find(self, name: str) -> tuple[Slot, str | None]:
        """The model that a client means and its adapter, of those that are known: see `meet`. Raises UnknownModelError listing
        what there is, and ApiError (400) for the model of a provider, which nothing here runs."""
        if (provider := self.settings.provider_of(name)) is not None:
            raise ApiError(
                400,
                f"{_shown(name)} is a model of the provider {provider.name}, and those answer through /v1/chat/completions, "
                "/v1/completions and /v1/embeddings only",
                param="model",
                code="unsupported_model",
            )
        if (found := self.known(name)) is not None:
            return found
        known = ", ".join(dict.fromkeys(self._all_names())) or "none"
        hint = f" (herd pull {name} downloads one)" if self.settings.any_model and name.isprintable() else ""
        raise UnknownModelError(f"there is no model {_shown(name)} here; those are {known[:LISTED]}{hint}")

    def known(self, name: str) -> tuple[Slot, str | None] | None:
        """The model that a client means and its adapter, if it is known."""
        for spelled in (name, *_tags(name)):
            if (found := self._known(spelled)) is not None:
                return found
        base, at, adapter = name.rpartition("@")
        if at and (found := self._known(base)) is not None and adapter in found[0].adapters:
            return found[0], adapter
        return None

    def _known(self, name: str) -> tuple[Slot, str | None] | None:
        for known, slot, adapter in self.names():
            if name == known:
                return slot, adapter or slot.spec.own
        slot = self.slots.get(self._spelled.get(name, ""))
        return None if slot is None else (slot, slot.spec.own)

    def _same(self, spec: ModelSpec) -> Slot | None:
        """The slot that has what `spec` means already, under another name."""
        same = (slot for slot in self.slots.values() if replace(slot.spec, name=spec.name, aliases=()) == spec)
        return next(same, None)

    def _all_names(self) -> list[str]:
        """Names for people: of what is on this machine, those that were there when it was last looked at."""
        return [name for name, _, _ in self.names()] + [one.name for one in self._here]

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[tuple[Slot, Launched, str | None]]:
        """The loaded model behind `name`, which stays loaded inside. Raises UnknownModelError, or ApiError when it cannot be."""
        await self.meet(name)
        slot, adapter = self.find(name)
        slot.users += 1
        try:
            yield slot, await self._loaded(slot), adapter
        finally:
            slot.users -= 1
            slot.used = time.monotonic()

    async def load(self, name: str) -> Ready:
        """Load a model without using it. Raises as `use`."""
        async with self.use(name) as (_, process, _):
            return await process.ready()

    async def unload(self, name: str, why: str = "the model was unloaded") -> bool:
        """End a model's process; whether there was one."""
        slot, _ = self.find(name)
        process, slot.process, slot.loaded_at = slot.process, None, None
        slot.keep_alive, slot.let_go = slot.spec.keep_alive, True
        if process is None:
            return False
        await process.stop(why)
        return True

    async def forget(self, name: str) -> None:
        """Unload a model and know it no more."""
        with contextlib.suppress(UnknownModelError):
            slot, _ = self.find(name)
            await self.unload(slot.spec.name)
            self.slots.pop(slot.spec.name, None)

    async def release(self, name: str) -> bool:
        """Unload a model as soon as nobody uses it, now if nobody does; whether it was loaded."""
        slot, _ = self.find(name)
        if slot.process is None:
            return False
        if slot.users or slot.state == "loading":
            slot.keep_alive = 0.0
            return True
        return await self.unload(name)

    def rows(self) -> list[dict[str, Any]]:
        """The models that take memory now, for `ps`: measured bytes, seconds until they are unloaded (None: never)."""
        now = time.monotonic()
        out = []
        for slot in self.slots.values():
            if slot.process is None or slot.state == "failed":
                continue
            about = slot.about
            left = None if slot.keep_alive is None or slot.users else max(0.0, slot.keep_alive - (now - slot.used))
            out.append(
                {
                    "name": slot.spec.name,
                    "state": slot.state,
                    "source": slot.spec.source,
                    "memory": slot.process.memory(),
                    "device": None if about is None else about.device,
                    "device_memory": slot.process.stats.get("device_memory"),
                    "context": slot.context(),
                    "parameters": None if about is None else about.parameters,
                    "kind": None if about is None else about.kind,
                    "pid": slot.process.pid,
                    "requests": slot.process.calls,
                    "expires_in": left,
                    "progress": {"phase": slot.process.progress.phase, "share": slot.process.progress.share},
                }
            )
        return out

    def health(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether requests can be answered now, and how each model that was named does: not why, which is not for everybody."""
        rows, good = [], True
        for slot in self.slots.values():
            if not self._expected(slot):
                continue
            row: dict[str, Any] = {"model": slot.spec.name, "state": slot.state}
            if slot.process is not None and slot.state == "loading":
                row["phase"], row["share"] = slot.process.progress.phase, slot.process.progress.share
            good = good and slot.state == "ready"
            rows.append(row)
        return good, rows

    def _expected(self, slot: Slot) -> bool:
        """Whether the server is not well without it."""
        if slot.process is not None:
            return True
        return (
            not slot.let_go and not self.settings.lazy and slot.keep_alive is None and slot.spec in self.settings.models
        )

    async def _loaded(self, slot: Slot) -> Launched:
        async with slot.lock:
            process = slot.process
            if process is not None and process.error is not None and _again(slot, process.error):
                slot.process = process = None
            if process is None:
                await self._make_room(slot)
                process = slot.process = self._launch(slot.spec if not slot.adapters else _with_adapters(slot))
                slot.changed = None
                await process.start()
        try:
            # Not wait_for: Python 3.11's forgets that the caller was cancelled when the process is ready in the same moment.
            async with asyncio.timeout(self.settings.load_seconds):
                await process.ready()
        except TimeoutError:
            await process.stop(f"loading it took more than {self.settings.load_seconds:g} s")
        except WorkerError:
            pass
        if process.error is not None:
            if not slot.failed_at or process.about is not None:
                slot.failed_at = time.monotonic()
                log.error("%s: %s", slot.spec.name, process.error)  # all of it; clients are told less
            error = process.error
            if process.about is not None:
                raise error
            raise WorkerError(f"{slot.spec.name} cannot be loaded: {pathless(str(error), slot.spec)}", kind="NotLoaded")
        slot.failed_at, slot.let_go = 0.0, False
        if slot.loaded_at is None:
            slot.loaded_at = slot.used = time.monotonic()
        return process

    async def _make_room(self, slot: Slot) -> None:
        """Unload models that nobody uses, the longest unused first, until one more may be loaded."""
        async with self._room:
            while True:
                loaded = [
                    s
                    for s in self.slots.values()
                    if s.process is not None and s.process.error is None and s is not slot
                ]
                if len(loaded) < self.settings.max_loaded:
                    return
                idle = sorted((s for s in loaded if not s.users and s.state == "ready"), key=lambda s: s.used)
                if not idle:
                    raise ApiError(
                        503,
                        f"{len(loaded)} models are loaded and busy, and no more are loaded at once: try again later",
                        code="models_busy",
                        retry_after=5,
                    )
                await self.unload(idle[0].spec.name, "its place was needed for another model")

    async def _load_named(self) -> None:
        for slot in list(self.slots.values()):
            try:
                async with self.use(slot.spec.name):
                    pass
            except ApiError as error:
                log.error("%s", error)
            except WorkerError:
                continue  # it is in the log

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_LOOK_SECONDS)
            now = time.monotonic()
            for slot in list(self.slots.values()):
                idle = slot.state == "ready" and not slot.users and slot.keep_alive is not None
                if idle and now - slot.used >= (slot.keep_alive or 0):
                    log.info("%s is unloaded: nobody used it for %g s", slot.spec.name, slot.keep_alive)
                    await self.unload(slot.spec.name)

    def _go(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _with_adapters(slot: Slot) -> ModelSpec:
    return replace(slot.spec, adapters=tuple(slot.adapters.items()))


def _again(slot: Slot, error: WorkerError) -> bool:
    """Whether it is worth starting what has failed once more: always after a crash, after a while when it could not load."""
    if slot.process is not None and slot.process.about is not None:
        return True
    return time.monotonic() - slot.failed_at >= RETRY_SECONDS


def _shown(name: str) -> str:
    return ascii(name[:80])


def _tags(name: str) -> tuple[str, ...]:
    """The same name in Ollama's other spelling: `:latest` is what a name without a tag means."""
    base, colon, tag = name.rpartition(":")
    if not colon:
        return (f"{name}:latest",)
    return (base,) if tag == "latest" else ()
