"""A worker process: asked, cancelled at any moment, killed, unable to load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from herd.server.process import Process, WorkerError
from herd.server.protocol import Began, Call, Chat, Ended, Finished, Ids, Piece, Text
from herd.server.settings import EngineOptions, ModelSpec

LONG = {"ignore_stop_ids": True, "temperature": 1.0, "seed": 1}
SOON = 20.0
"""Seconds in which a worker does what it does at once, on a machine that others use, too."""


@contextlib.asynccontextmanager
async def worker(source: str = "nano", **options: object) -> AsyncIterator[Process]:
    process = Process(ModelSpec(source=source, name="it", options=EngineOptions(**options)))  # type: ignore[arg-type]
    await process.start()
    try:
        yield process
    finally:
        await process.stop()


async def until(true: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(SOON):
        while not true():
            await asyncio.sleep(0.02)
    assert true(), what


def idle(process: Process) -> bool:
    stats = process.stats
    return stats.get("running") == 0 and stats["waiting"] == 0 and stats["blocks_used"] == 0


def test_one_worker_through_all_of_it() -> None:
    """One process for what needs no fresh one: a start takes seconds."""

    async def run() -> None:
        async with worker(max_seqs=4) as process:
            about = await process.ready()
            assert (about.context, about.format, about.tools, about.infill) == (512, "llama3", False, False)
            assert about.parameters == 5_493_504 or about.parameters > 5_000_000
            assert (process.memory() or 0) > 50 << 20
            for check in (whole, cancelled_at_every_stage, many_cancels, questions, refusals):
                await check(process)
                assert process.error is None

    asyncio.run(run())


async def whole(process: Process) -> None:
    events = [
        event async for event in process.run(Call("w", Text("Once upon a time"), {"max_tokens": 5, "temperature": 0}))
    ]
    assert isinstance(events[0], Began)
    assert isinstance(events[-1], Finished)
    assert isinstance(events[-2], Ended)
    assert "".join(event.text for event in events if isinstance(event, Piece)).strip()
    assert events[-1].usage.completion_tokens == 5
    assert events[-1].usage.prompt_seconds > 0


async def cancelled_at_every_stage(process: Process) -> None:
    for number, stage in enumerate(("before", "began", "piece")):
        events = process.run(Call(f"c{number}", Text("Once upon a time"), LONG))
        if stage == "before":
            task = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        elif stage == "began":
            await anext(events)
        else:
            while not isinstance(await anext(events), Piece):
                pass
        await events.aclose()
        await events.aclose()
        assert process.calls == 0
    process.stats = {}
    await until(lambda: idle(process), "a cancelled call still runs")


async def many_cancels(process: Process) -> None:
    """200 calls that are left after no time, a little and more: nothing stays."""

    async def one(number: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(number % 10 * 0.003),
                contextlib.aclosing(
                    process.run(Call(f"m{number}", Text("Once upon a time"), LONG | {"n": 1 + number % 3}))
                ) as events,
            ):
                async for _ in events:
                    pass

    for start in range(0, 200, 40):
        await asyncio.gather(*(one(i) for i in range(start, start + 40)))
    process.stats = {}
    await until(lambda: idle(process), "a cancelled call still runs")
    await whole(process)


async def questions(process: Process) -> None:
    tokens = await process.ask("tokenize", text="Once upon", special=False)
    assert await process.ask("detokenize", tokens=tokens["tokens"]) == "Once upon"
    chat = await process.ask("tokenize", messages=[{"role": "user", "content": "Hi"}], pieces=True)
    assert chat["pieces"][0] == "<|begin_of_text|>"
    for what, args, kind in (
        ("rm_rf", {}, "ConfigError"),
        ("detokenize", {"tokens": [10**9]}, "TokenizerError"),
        ("tokenize", {"nonsense": 1}, "Bug"),
        ("load_adapter", {"name": "x", "path": "/nowhere"}, "CheckpointError"),
    ):
        with pytest.raises(WorkerError) as caught:
            await process.ask(what, **args)
        assert caught.value.kind == kind, caught.value


async def refusals(process: Process) -> None:
    for number, (call, kind) in enumerate(
        (
            (Call("", Ids((10**6,))), "ConfigError"),
            (Call("", Ids(())), "ConfigError"),
            (Call("", Text("a " * 600)), "ContextFullError"),
            (Call("", Chat(({"role": "nobody", "content": ""},))), "PromptError"),
            (Call("", Text("x"), {"temperature": -1}), "ConfigError"),
            (Call("", Text("x"), {"nonsense": 1}), "Bug"),
            (Call("", Text("x"), adapter="no"), "ConfigError"),
            (Call("", Text("x"), {"schema": {"type": "nonsense"}}), "ConfigError"),
        )
    ):
        with pytest.raises(WorkerError) as caught:
            async for _ in process.run(Call(f"r{number}", call.prompt, call.sampling, call.adapter)):
                pass
        assert caught.value.kind == kind, caught.value
        assert f"r{number}" not in str(caught.value), "ids are nobody's business"


def test_a_killed_worker_tells_everyone() -> None:
    async def run() -> None:
        async with worker() as process:
            await process.ready()
            events = process.run(Call("1", Text("Once"), LONG))
            await anext(events)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(WorkerError, match="SIGKILL"):
                async with asyncio.timeout(SOON):
                    async for _ in events:
                        pass
            assert process.error is not None
            assert process.error.kind == "Crashed"
            for again in (process.ready, lambda: process.ask("tokenize", text="x")):
                work: Awaitable[object] = again()
                with pytest.raises(WorkerError):
                    await work

    asyncio.run(run())


def test_what_cannot_be_loaded_says_why() -> None:
    async def run() -> None:
        async with worker("no-such-model") as process:
            with pytest.raises(WorkerError, match="no-such-model") as caught:
                await process.ready()
            assert caught.value.kind == "UnknownModelError"

    asyncio.run(run())


def test_a_worker_ends_with_its_server() -> None:
    """When the socket closes without a word, as when the server is killed, the process ends."""

    async def run() -> None:
        async with worker() as process:
            pid = process.pid
            assert process._writer is not None
            process._writer.transport.abort()
            await until(lambda: process.pid is None, f"worker {pid} is still there")

    asyncio.run(run())
