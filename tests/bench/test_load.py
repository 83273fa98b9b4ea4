"""`herd bench serve` against servers whose behaviour is known, and against herd's own."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.bench.load.client import Outcome, Target
from herd.bench.load.figures import figures, jain, percentile
from herd.bench.load.own import OwnServer
from herd.bench.load.run import Level, measure, the_model, warm_up
from herd.bench.load.work import IDS, Item, Work, read_dataset
from herd.cli.bench_serve import command
from herd.cli.main import run
from herd.errors import BenchError, ConfigError

SLACK = 0.15
"""Seconds that a busy machine may add to a wait; what is waited for is several times longer."""
FAIR = 0.8
"""Jain's index that equal clients of a fair server must reach; half of them getting nothing would be 0.5."""

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


@asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[Target]:
    """An HTTP server that reads a request's body and leaves the rest to `serve`."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            data = await reader.readexactly(int(length[1])) if length else b""
            await serve(reader, writer, json.loads(data) if data else {"head": head.decode()})
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(one, "127.0.0.1", 0)
    async with listening:
        yield Target(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")


def chunk(value: Any) -> bytes:
    data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
END = b"0\r\n\r\n"


def saying(first: float, between: float, pieces: int, tokens: int | None = None) -> Serve:
    """A server that waits, and then sends pieces at even distances."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(HEAD)
        await asyncio.sleep(first)
        for number in range(pieces):
            if number:
                await asyncio.sleep(between)
            writer.write(chunk({"choices": [{"text": "x"}]}))
            await writer.drain()
        if tokens is not None:
            writer.write(chunk({"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 7}}))
        writer.write(chunk(b"[DONE]") + END)
        await writer.drain()

    return serve


def raw(data: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(data)
        await writer.drain()

    return serve


async def outcome_of(serve: Serve, seconds: float = 10.0) -> Outcome:
    async with server(serve) as target:
        found = Outcome(0, 0.0)
        await target.ask(found, "/v1/completions", {"model": "m"}, seconds)
        return found


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.sampled_from([0, 1, 50, 90, 99, 100]))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-9)


def test_fairness_of_known_shares() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 2.0, 3.0]) == pytest.approx(36 / 42)  # (sum x)^2 / (n sum x^2), by hand
    assert jain([]) is None
    assert jain([0.0, 0.0]) is None


def test_figures_of_known_outcomes() -> None:
    """Two clients: one got 10 tokens in a second, the other 5 in two, after waiting for its turn; a third request failed."""
    outcomes = [
        Outcome(0, 0.0, 0.0, 1.0, [0.1, 0.5, 1.0], 10, 4, True),
        Outcome(1, 0.0, 0.5, 2.0, [1.0, 2.0], 5, 4, True),
        Outcome(1, 2.0, 2.0, 2.0, [], 3, 0, False, "500: no"),
    ]
    found = figures(outcomes, clients=2, began=0.0)
    assert (found["requests"], found["failed"], found["errors"]) == (3, 1, {"500: no": 1})
    assert found["output_tokens"] == 15
    assert found["output_tokens_per_s"] == 7.5
    assert found["ttft"]["p50"] == pytest.approx(0.55)  # from when it was due, not from when it was sent
    assert found["per_token"]["max"] == pytest.approx(0.25)
    assert found["gaps"]["max"] == pytest.approx(1.0)
    assert found["late"]["max"] == pytest.approx(0.5)
    assert found["fairness"] == pytest.approx(12.5**2 / (2 * (10**2 + 2.5**2)), abs=1e-4)


async def _times() -> None:
    found = await outcome_of(saying(0.3, 0.2, 3))
    assert found.error is None
    assert 0.3 <= found.stamps[0] - found.sent < 0.3 + SLACK
    assert all(0.2 - 0.05 <= b - a < 0.2 + SLACK for a, b in zip(found.stamps, found.stamps[1:], strict=False))
    assert (found.tokens, found.counted) == (3, False)
    told = await outcome_of(saying(0.0, 0.0, 2, tokens=9))
    assert (told.tokens, told.prompt_tokens, told.counted) == (9, 7, True)


def test_times_and_counts_of_a_stream() -> None:
    asyncio.run(_times())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed before an answer"),
        (b"SSH-2.0-x\r\n", "not HTTP"),
        (b'HTTP/1.1 429 Busy\r\nContent-Length: 28\r\n\r\n{"error":{"message":"full"}}', "429: full"),
        (b"HTTP/1.1 500 Oh\r\n\r\nplain words", "500: plain words"),
        (HEAD + chunk({"choices": [{"text": "a"}]}) + END, r"without \[DONE\]"),
        (HEAD + chunk({"choices": [{"text": "a"}]})[:-9], "IncompleteReadError"),
        (HEAD + b"zz\r\n", "ValueError"),
        (HEAD + chunk(b"{no json"), "JSONDecodeError"),
        (HEAD + chunk({"error": {"message": "gone"}}) + chunk(b"[DONE]") + END, "in the stream: gone"),
        (HEAD + chunk(b"[DONE]") + END, "an empty reply"),
    ],
)
def test_what_goes_wrong_is_an_error_with_words(answer: bytes, words: str) -> None:
    found = asyncio.run(outcome_of(raw(answer)))
    assert found.error is not None
    assert re.search(words, found.error)
    assert found.ended


def test_a_server_that_never_ends_is_left() -> None:
    found = asyncio.run(outcome_of(saying(30, 0, 1), seconds=0.2))
    assert found.error == "no end after 0.2 s"


def test_nobody_there() -> None:
    with pytest.raises(BenchError, match="does not answer"):
        asyncio.run(the_model(Target("http://127.0.0.1:9")))
    for url in ("127.0.0.1:8000", "ftp://x", "http://", ""):
        with pytest.raises(ConfigError, match="not the address"):
            Target(url)


async def _crowd(level: Level) -> tuple[dict[str, Any], int, list[Any]]:
    """The figures, the most requests that were there at once, and their prompts."""
    here, most, prompts = 0, 0, []
    say = saying(0.05, 0.0, 1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        nonlocal here, most
        prompts.append(body["prompt"])
        here += 1
        most = max(most, here)
        await say(reader, writer, body)
        here -= 1

    async with server(serve) as target:
        return await measure(target, Work(model="m", prompt_tokens=5), level), most, prompts


def test_a_closed_loop_keeps_its_number_of_clients() -> None:
    found, most, prompts = asyncio.run(_crowd(Level(clients=4, requests=12)))
    assert (found["requests"], found["failed"], most) == (12, 0, 4)
    assert found["fairness"] > FAIR
    assert len({tuple(prompt) for prompt in prompts}) == 12  # a cache of prompts finds nothing
    assert all(len(prompt) == 5 and all(IDS[0] <= id < IDS[1] for id in prompt) for prompt in prompts)


def test_a_level_of_some_seconds_ends() -> None:
    found, _, _ = asyncio.run(_crowd(Level(clients=2, seconds=0.3)))
    assert found["requests"] >= 4
    assert 0.3 <= found["seconds"] < 0.3 + 0.05 + SLACK


async def _behind() -> dict[str, Any]:
    lock = asyncio.Lock()
    say = saying(0.05, 0.0, 1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        async with lock:
            await say(reader, writer, body)

    async with server(serve) as target:
        return await measure(target, Work(model="m"), Level(clients=1, rate=100.0, requests=10))


def test_an_open_loop_counts_waiting_for_a_server_that_is_behind() -> None:
    """100 requests a second to a server that answers 20: the last one waited for the nine before it."""
    found = asyncio.run(_behind())
    assert found["requests"] == 10
    assert found["ttft"]["max"] > 0.35
    assert found["ttft"]["p50"] > 0.15


def test_a_server_that_refuses_everything_is_no_measurement() -> None:
    async def ask(warm: bool) -> None:
        async with server(raw(b"HTTP/1.1 401 No\r\n\r\nno key")) as target:
            if warm:
                await warm_up(target, Work(model="m"), 5)
            await measure(target, Work(model="m"), Level(clients=1, requests=2))

    with pytest.raises(BenchError, match=r"none of 2 requests: 401: no key"):
        asyncio.run(ask(False))
    with pytest.raises(BenchError, match=r"does not answer requests: 401: no key"):
        asyncio.run(ask(True))


def test_the_same_seed_is_the_same_load() -> None:
    work = Work(model="m", prompt_tokens=8)
    first, again, other = (next(iter(work.bodies(seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert first[1]["ignore_eos"] is True
    assert "ignore_eos" not in next(iter(Work(model="m", ends=True).bodies(0)))[1]


def test_datasets(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "Hi", "max_tokens": 5}\n\n{"messages": [{"role": "user", "content": "Yo"}]}\n')
    items = read_dataset(file)
    assert items == [Item("Hi", tokens=5), Item(messages=({"role": "user", "content": "Yo"},))]
    bodies = Work(model="m", items=items).bodies(0)
    (path, body), (chat, talk) = next(bodies), next(bodies)
    assert (path, body["prompt"], body["max_tokens"]) == ("/v1/completions", "Hi", 5)
    assert (chat, talk["messages"][0]["content"], talk["max_tokens"]) == ("/v1/chat/completions", "Yo", 64)
    file.write_text('[{"conversations": [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "it"}]}]')
    assert read_dataset(file)[0].messages == ({"role": "user", "content": "Say"},)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{bad', "line 2"),
        ('{"prompt": ""}', "entry 1: expected a prompt"),
        ("3", "expected an object"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"messages": []}', "expected a prompt"),
        ("[{}", "line 1"),
        ("\ud800", "surrogates|decode"),
    ],
)
def test_bad_datasets_are_refused_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=words):
        read_dataset(file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a server"),
        (["--model", "nano", "--concurrency", "0"], "is not a list"),
        (["--model", "nano", "--concurrency", "x,1"], "is not a list"),
        (["--model", "nano", "--rate", "1", "--concurrency", "1"], "do not go together"),
        (["--model", "nano", "--requests", "1", "--seconds", "1"], "do not go together"),
        (["--model", "nano", "--api-key", "k"], "--api-key is for --url"),
        (["--url", "http://x", "--serve-options", "-np 3"], "leave out --url"),
    ],
)
def test_command_lines_that_make_no_sense(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_it_is_a_command_of_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "--help"]) == 0
    assert "herd bench serve --model nano" in capsys.readouterr().out


@pytest.fixture(scope="module")
def nano() -> Iterator[OwnServer]:
    with OwnServer("nano", ["-np", "8"]) as own:
        yield own


def test_a_model_that_is_not_there_is_said() -> None:
    with pytest.raises(BenchError, match="no-such-model"):
        OwnServer("./no-such-model")


@pytest.mark.parametrize("clients", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_herd_under_many_clients(
    clients: int, nano: OwnServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command, with a plot: no error, and everybody gets about the same."""
    picture = tmp_path / "load.png"
    requests = 2 * clients
    levels = ["--concurrency", f"4,{clients}", "--requests", str(requests), "--prompt-tokens", "16"]
    words = ["--url", nano.target.url, "--peer-url", f"again={nano.target.url}", *levels, "--output-tokens", "4"]
    words += ["--json", "--plot", str(picture)]
    assert run(["bench", "serve", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["who"], row["clients"]) for row in report["rows"]] == [
        ("server", 4), ("server", clients), ("again", 4), ("again", clients),
    ]  # fmt: skip
    for row in report["rows"]:
        assert (row["requests"], row["failed"]) == (requests, 0)
        assert (row["output_tokens"], row["prompt_tokens"]) == (requests * 4, requests * 16)
        assert row["counted_by_server"]
        assert row["fairness"] > FAIR
        assert 0 < row["ttft"]["p50"] <= row["ttft"]["p99"] <= row["end_to_end"]["max"]
    assert report["rows"][3]["times"] > 0
    assert report["rows"][1]["times"] is None
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_64_clients_for_a_minute(nano: OwnServer) -> None:
    work = Work(model="bench", prompt_tokens=64, output_tokens=32)
    found = asyncio.run(measure(nano.target, work, Level(clients=64, seconds=60)))
    print({name: found[name] for name in ("requests", "failed", "fairness", "output_tokens_per_s", "ttft")})
    assert found["failed"] == 0
    assert found["seconds"] >= 60
    assert found["requests"] >= 64
    assert found["fairness"] > FAIR
