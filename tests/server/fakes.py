"""A model that says what it was told to say, in the place of a worker process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

from herd.server.process import WorkerError
from herd.server.protocol import Began, Call, Ended, Event, Finished, Piece, Progress, Ready, Usage
from herd.server.settings import ModelSpec

ABOUT = Ready(
    source="fake",
    path="fake",
    parameters=1000,
    kind="float32",
    context=128,
    format="llama3.1",
    tools=True,
    infill=False,
    grammar=True,
    seqs=2,
    budget="no memory at all",
    fingerprint="fp_fake",
    family="llama3",
)
Script = Sequence[Any]
"""Events without their call ids, exceptions to raise, and seconds to wait."""


def saying(*texts: str, reason: Any = "stop") -> Script:
    """A reply of these pieces."""
    return [
        Began("", 3),
        *(Piece("", 0, text) for text in texts),
        Ended("", 0, reason, None, len(texts)),
        Finished("", Usage(3, len(texts), 1, 0.01, 0.02)),
    ]


class Scripted:
    """A `herd.server.models.Launched`: `script(call)` is what comes of a call. `cancelled` are those left early."""

    def __init__(self, spec: ModelSpec, script: Callable[[Call], Script], *, wait: asyncio.Event | None = None) -> None:
        self.spec, self.script = spec, script
        self.progress = Progress("reading weights", 0.5)
        self.about: Ready | None = None
        self.stats: dict[str, Any] = {}
        self.error: WorkerError | None = None
        self.seen: list[Call] = []
        self.cancelled: list[str] = []
        self.running = 0
        self.wait = wait

    @property
    def pid(self) -> int | None:
        return None

    @property
    def calls(self) -> int:
        return self.running

    def memory(self) -> int | None:
        return 1 << 20

    async def start(self) -> None:
        return None

    async def ready(self) -> Ready:
        if self.wait is not None:
            await self.wait.wait()
        if self.error is not None:
            raise self.error
        self.about = ABOUT
        return ABOUT

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        self.seen.append(call)
        self.running += 1
        over = False
        try:
            for item in self.script(call):
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, int | float):
                    await asyncio.sleep(item)
                    continue
                over = isinstance(item, Finished)
                yield replace(item, call=call.id)
        finally:
            self.running -= 1
            if not over:
                self.cancelled.append(call.id)

    async def ask(self, what: str, **args: Any) -> Any:
        return {"what": what, "args": args}

    async def stop(self, why: str = "") -> None:
        self.error = WorkerError(why, kind="Stopped")
