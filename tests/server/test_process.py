"""A worker process: asked, cancelled at any moment, killed, unable to load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from herd.server import wire
from herd.server.asks import ASKS
from herd.server.process import Process, WorkerError
from herd.server.protocol import (
    UP,
    Answer,
    Ask,
    Began,
    Call,
    Cancel,
    Chat,
    Ended,
    Failed,
    Finished,
    Gone,
    Ids,
    Piece,
    Text,
)
from herd.server.settings import EngineOptions, ModelSpec
from herd.server.worker import NICE, THREADS, Worker
from tests.server.conftest import faked

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
            for check in (whole, priorities, cancelled_at_every_stage, many_cancels, questions, refusals):
                await check(process)
                assert process.error is None
            await killed(process)

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


async def priorities(process: Process) -> None:
    """Threads that prepare calls let others go first, and the engine is one of those others, whoever brought the first call."""
    if sys.platform != "linux":
        return

    def threads() -> dict[str, tuple[int, int]]:
        """Of each thread: what it has computed, and by how much it is nicer than we are."""
        stats = [(path / "stat").read_text() for path in Path(f"/proc/{process.pid}/task").iterdir()]
        fields = {stat.split()[0]: stat.rsplit(")", 1)[1].split() for stat in stats}
        own = os.getpriority(os.PRIO_PROCESS, 0)
        return {id: (int(one[11]) + int(one[12]), int(one[16]) - own) for id, one in fields.items()}

    before = threads()
    async for _ in process.run(Call("p", Text("Once upon a time"), LONG | {"max_tokens": 400})):
        pass
    after = threads()
    computed = {id: used - before.get(id, (0, 0))[0] for id, (used, _) in after.items()}
    assert after[max(computed, key=lambda id: computed[id])][1] == 0, "the thread that computes is the engine's"
    most = 19 - os.getpriority(os.PRIO_PROCESS, 0)
    assert min(NICE, most) in [nice for _, nice in after.values()], "no thread stands back"


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
        await until(lambda: process.calls == 0, "the worker does not let go of a call")


async def many_cancels(process: Process) -> None:
    """200 calls that are left after no time, a little and more: nothing stays, of those before neither."""

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
    left = asyncio.ensure_future(process.ask("tokenize", text="a b " * 500_000))
    await asyncio.sleep(0)
    left.cancel()
    await until(lambda: process.calls == 0, "the worker does not let go of a question")
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


async def killed(process: Process) -> None:
    """Everyone is told."""
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


class Heard:
    """What a worker says."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: list[object] = []

    def next(self) -> object:
        """The next message, waited for."""
        while not self._messages:
            self._messages += UP.decode(self._read(wire.split_header(self._read(wire.HEADER))))
        return self._messages.pop(0)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._connection.recv(size - len(data))
        return data

    @property
    def nothing(self) -> bool:
        """Whether there is none now."""
        return not self._messages and not select.select([self._connection], [], [], 0)[0]


@contextlib.contextmanager
def worker_here() -> Iterator[tuple[Worker, Heard]]:
    """A worker without a process or a model."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SOON)
    with ours, theirs:
        worker = Worker(theirs)
        worker._llm = object()  # type: ignore[assignment]
        try:
            yield worker, Heard(ours)
        finally:
            worker._pool.shutdown()


def test_what_is_left_is_not_begun_and_counts_until_it_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    go, began = threading.Event(), []

    def hold(llm: object, number: int) -> int:
        began.append(number)
        assert go.wait(SOON)
        return number

    class Preparer:
        def prepared(self, call: Call) -> None:
            raise AssertionError("a call that was cancelled is prepared")

    monkeypatch.setitem(ASKS, "hold", hold)
    with worker_here() as (worker, heard):
        worker._preparer = Preparer()  # type: ignore[assignment]
        for number in range(THREADS):
            worker._take(Ask(f"a{number}", "hold", {"number": number}))
        worker._take(Ask("late", "hold", {"number": 99}))
        worker._take(Call("call", Text("x")))
        end = time.monotonic() + SOON
        while len(began) < THREADS and time.monotonic() < end:
            time.sleep(0.01)
        for id in ("late", "call", "unknown"):
            worker._take(Cancel(id))
            assert heard.next() == Gone(id), "nobody is at it"
        worker._take(Cancel("a0"))
        time.sleep(0.05)
        assert heard.nothing, "it is let go of at its end"
        go.set()
        worker._pool.shutdown()
        said = [heard.next() for _ in range(THREADS)]
        assert sorted(said, key=repr) == sorted(
            [Gone("a0"), *(Answer(f"a{n}", n) for n in range(1, THREADS))], key=repr
        )
        assert heard.nothing
        assert 99 not in began


def test_a_bug_leaves_its_frames_and_no_text_of_a_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(llm: object, text: str) -> None:
        try:
            raise KeyError(text)
        except KeyError as error:
            raise TypeError(f"because of {text}") from error

    monkeypatch.setitem(ASKS, "broken", broken)
    with worker_here() as (worker, heard):
        worker._take(Ask("a", "broken", {"text": "my secret"}))
        failed = heard.next()
    assert isinstance(failed, Failed)
    assert failed.kind == "Bug"
    told = capsys.readouterr().err
    assert "in broken" in told
    assert "KeyError" in told
    assert "TypeError" in told
    assert "my secret" not in told + failed.message


def test_an_answer_that_is_too_large_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 4000)
    got: list[object] = []
    with worker_here() as (worker, heard):
        for message in (
            Answer("a", 1),
            Answer("b", "x" * 9000),
            *(Piece("c", text="y" * 900) for _ in range(9)),
        ):
            worker.say(message)
        worker.send(Gone("d"))
        while not got or got[-1] != Gone("d"):
            got.append(heard.next())
    assert [type(one).__name__ for one in got] == ["Answer", "Failed", *["Piece"] * 9, "Gone"]
    assert isinstance(got[1], Failed)
    assert (got[1].call, got[1].kind) == ("b", "ConfigError")


def test_frames_that_make_no_sense_end_a_worker() -> None:
    async def run() -> None:
        for data in (wire.frame(b"nonsense"), b"\xff\xff\xff\xff"):
            process = Process(ModelSpec(source="nano", name="it"))
            events = process.run(Call("1", Text("x")))
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            reader = asyncio.StreamReader()
            reader.feed_data(data)
            async with asyncio.timeout(SOON):
                await process._listen(reader)
                with pytest.raises(WorkerError, match="cannot be read"):
                    await waiting
            assert process.error is not None

    asyncio.run(run())


def test_requests_wait_as_long_as_the_worker_does_not_read() -> None:
    """Of many large ones one is in memory as bytes, and one that is left meanwhile is never sent."""

    async def run() -> None:
        process = Process(ModelSpec(source="nano", name="it"))
        ours, theirs = socket.socketpair()
        with theirs:
            _, process._writer = await asyncio.open_connection(sock=ours)
            size = 2_000_000
            calls = [process.run(Call(str(number), Text("x" * size))) for number in range(8)]
            waiting = [asyncio.ensure_future(anext(call)) for call in calls]
            await asyncio.sleep(0.05)
            assert process._writer.transport.get_write_buffer_size() < 2 * size
            waiting[-1].cancel()
            await asyncio.wait({waiting[-1]})
            assert process.calls == 7, "nobody has to let go of what was not sent"
            waiting[0].cancel()
            await asyncio.wait({waiting[0]})
            assert process.calls == 7, "what was sent counts until the worker says Gone"
            process._take(Gone("0"))
            assert process.calls == 6
            await process.stop()
            async with asyncio.timeout(SOON):
                for error in await asyncio.gather(*waiting[1:-1], return_exceptions=True):
                    assert isinstance(error, WorkerError)

    asyncio.run(run())


def test_what_the_worker_is_still_busy_with_takes_a_place_in_the_queue() -> None:
    async def run() -> None:
        async with faked(max_queue=1) as fake:
            body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
            assert (await fake.client.post("/v1/chat/completions", json=body)).status_code == 200
            fake.model.running = 3  # two that run and one that waits, all left by their clients
            refused = await fake.client.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            fake.model.running = 2
            assert (await fake.client.post("/v1/chat/completions", json=body)).status_code == 200

    asyncio.run(run())
