"""Ollama's API with Ollama's own client on a live server, and over a model that says what it is told to."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from herd import __version__
from herd.server.ollama.fields import FOREVER, seconds_of
from herd.server.process import WorkerError
from herd.server.protocol import Began, Ended, Finished, Piece, ToolPiece, Truncated, Usage
from herd.server.settings import ModelSpec
from tests.server.conftest import Live, faked
from tests.server.fakes import saying

PATIENCE = 300
"""Seconds: models are loaded on the way, and a busy machine takes a while."""
HI = [{"role": "user", "content": "Tell me a story about a dog."}]
COLD = {"temperature": 0, "num_predict": 20}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA, "strict": True},
}


@pytest.fixture
def client(live: Live) -> Iterator[ollama.Client]:
    with ollama.Client(host=live.url, timeout=PATIENCE) as made:
        yield made


def test_chat_plain_and_streamed_are_the_same(client: ollama.Client) -> None:
    whole = client.chat("nano", HI, options=COLD)
    assert whole.message.role == "assistant"
    assert whole.message.content
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 20)
    assert whole.created_at is not None
    datetime.datetime.fromisoformat(whole.created_at)
    chunks = list(client.chat("nano", HI, options=COLD, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    last = chunks[-1]
    assert (last.done_reason, last.eval_count) == ("length", 20)
    assert last.prompt_eval_count == whole.prompt_eval_count
    parts = (last.load_duration or 0) + (last.eval_duration or 0)
    assert 0 < parts <= (last.total_duration or 0) < 60e9, "nanoseconds"


def test_generate_is_a_chat_of_one_message(client: ollama.Client) -> None:
    chat = client.chat("nano", [{"role": "system", "content": "Be brief."}, *HI], options=COLD)
    made = client.generate("nano", HI[0]["content"], system="Be brief.", options=COLD)
    assert made.response == chat.message.content
    assert made.prompt_eval_count == chat.prompt_eval_count
    streamed = list(client.generate("nano", HI[0]["content"], system="Be brief.", options=COLD, stream=True))
    assert "".join(chunk.response or "" for chunk in streamed) == made.response
    raw = client.generate("nano", HI[0]["content"], raw=True, options=COLD)
    assert (raw.prompt_eval_count or 0) < (made.prompt_eval_count or 0), "no template around it"


def test_options_are_honoured(client: ollama.Client) -> None:
    def said(**options: Any) -> str | None:
        return client.chat("nano", HI, options=COLD | options).message.content

    plain = said()
    assert plain is not None
    word = plain.split()[3]
    assert said(stop=[word]) == plain[: plain.index(word)]
    assert said(temperature=2, seed=1) == said(temperature=2, seed=1) != said(temperature=2, seed=2)
    assert said(temperature=2, top_k=1) == plain
    assert said(temperature=2, top_p=1e-6) == plain
    assert said(temperature=2, min_p=1) == plain
    assert said(repeat_penalty=1000.0) != plain
    assert said(num_ctx=512, num_keep=0, mirostat=0) == plain


def test_a_form_holds(client: ollama.Client) -> None:
    made = client.chat("json", HI, format=SCHEMA, options={"num_predict": 400})
    assert set(json.loads(made.message.content or "")) == {"city", "days"}
    made = client.generate("json", "Say something.", format=SCHEMA, options={"num_predict": 400})
    assert set(json.loads(made.response)) == {"city", "days"}


def test_logprobs(client: ollama.Client) -> None:
    made = client.chat("nano", HI, options=COLD, logprobs=True, top_logprobs=2)
    assert made.logprobs is not None
    assert len(made.logprobs) == 20
    assert all(one.logprob <= 0 and len(one.top_logprobs or ()) == 2 for one in made.logprobs)
    chunks = list(client.chat("nano", HI, options=COLD, logprobs=True, stream=True))
    assert [one.token for chunk in chunks for one in chunk.logprobs or ()] == [one.token for one in made.logprobs]


def test_embeddings(client: ollama.Client) -> None:
    made = client.embed("nano", ["A dog.", "A cat."])
    assert len(made.embeddings) == 2
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-4 for vector in made.embeddings), "float32"
    one = client.embed("nano", "A dog.", dimensions=16)
    assert len(one.embeddings[0]) == 16
    assert (made.prompt_eval_count or 0) > (one.prompt_eval_count or 0)
    assert client.embeddings("nano", "A dog.").embedding
    with pytest.raises(ollama.ResponseError, match="512"):
        client.embed("nano", "dog " * 2000)


def test_lists(client: ollama.Client, live: Live) -> None:
    client.chat("nano", HI, options=COLD)
    names = {model.model for model in client.list().models}
    assert {"nano", "herd-nano", "json", "python"} <= names
    [row] = [model for model in client.ps().models if model.model == "nano"]
    process = live.state.models.slots["nano"].process
    assert process is not None
    assert row.size is not None
    assert 50e6 < row.size < 4e9, "the memory of a process with torch"
    assert row.context_length == 512
    assert row.expires_at is not None
    shown = client.show("nano")
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.parameter_count"] == 5_475_584
    assert shown.details is not None
    assert shown.details.parameter_size == "5.5M"
    assert "tools" in (client.show("json").capabilities or ())
    assert httpx.get(f"{live.url}/api/version").json() == {"version": __version__}


def test_nothing_to_say_loads_and_unloads(client: ollama.Client, live: Live) -> None:
    assert client.generate("python").done_reason == "load"
    assert live.state.models.slots["python"].state == "ready"
    with pytest.raises(ollama.ResponseError, match="keep_alive"):
        client.generate("python", keep_alive=0)
    assert live.state.models.slots["python"].state == "ready", "the operator named it"


def test_the_spelling_of_tags(client: ollama.Client) -> None:
    assert client.chat("nano:latest", HI, options=COLD).model == "nano:latest"
    with pytest.raises(ollama.ResponseError, match="nano") as caught:
        client.chat("nano:7b", HI)
    assert caught.value.status_code == 404


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"think": True}, "think"),
    ("chat", {"think": "high"}, "think"),
    ("chat", {"unknown": 1}, "unknown"),
    ("chat", {"options": {"temperatur": 1}}, "options.temperatur"),
    ("chat", {"options": {"temperature": -1}}, "options.temperature"),
    ("chat", {"options": {"num_thread": 4}}, "options.num_thread"),
    ("chat", {"options": {"mirostat": 2}}, "options.mirostat"),
    ("chat", {"options": {"num_predict": 0}}, "options.num_predict"),
    ("chat", {"options": {"num_ctx": 4096}}, "options.num_ctx"),
    ("chat", {"options": {"stop": [""]}}, "options.stop"),
    ("chat", {"options": {"repeat_last_n": 64}}, "options.repeat_last_n"),
    ("chat", {"format": "yaml"}, "format"),
    ("chat", {"format": {"type": "nothing"}}, "nothing"),
    ("chat", {"keep_alive": "soon"}, "keep_alive"),
    ("chat", {"top_logprobs": 2}, "top_logprobs"),
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
    ("chat", {"messages": [{"role": "boss", "content": "x"}]}, "role"),
    ("chat", {"messages": [{"role": "user"}]}, "content"),
    ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
    ("generate", {"prompt": "x", "images": ["aGk="]}, "images"),
    ("generate", {"prompt": "x", "context": [1, 2]}, "context"),
    ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("generate", {"prompt": "x", "raw": True, "system": "s"}, "system"),
    ("embed", {"input": []}, "input"),
    ("embed", {"input": "x", "options": {"seed": 1}}, "options.seed"),
]


@pytest.mark.parametrize(("path", "more", "named"), WRONG, ids=[f"{path} {named}" for path, _, named in WRONG])
def test_what_cannot_be_honoured_is_named(http: httpx.Client, path: str, more: dict[str, Any], named: str) -> None:
    body = {"model": "nano"} | ({"messages": HI} if path == "chat" else {}) | more
    answer = http.post(f"/api/{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert named in answer.json()["error"]


def test_bodies_that_do_not_say_what_they_are(http: httpx.Client) -> None:
    data = json.dumps({"model": "nano", "messages": HI, "options": COLD, "stream": False})
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert http.post("/api/chat", content=data, headers=form).json()["done"]
    page = form | {"origin": "https://evil.example"}
    assert http.post("/api/chat", content=data, headers=page).status_code in (403, 415)


def test_calls_of_tools_and_their_results(client: ollama.Client) -> None:
    """Over a script: whether random weights call is not sure, and Ollama's API cannot demand it."""
    script = [
        Began("", 7),
        Piece("", 0, "Hm."),
        Piece("", 0, tool=ToolPiece(0, "call_ab", "weather")),
        Piece("", 0, tool=ToolPiece(0, arguments='{"city":')),
        Piece("", 0, tool=ToolPiece(0, arguments='"Oslo"}')),
        Piece("", 0, tool=ToolPiece(1, "call_cd", "clock")),
        Piece("", 0, tool=ToolPiece(1, arguments="{}")),
        Ended("", 0, "tool_calls", None, 9),
        Finished("", Usage(7, 9, 4, 0.1, 0.2)),
    ]
    calls = [
        {"id": "call_ab", "function": {"index": 0, "name": "weather", "arguments": {"city": "Oslo"}}},
        {"id": "call_cd", "function": {"index": 1, "name": "clock", "arguments": {}}},
    ]

    async def run() -> None:
        async with faked(lambda call: script) as fake:
            body: dict[str, Any] = {"model": "fake", "messages": HI, "tools": [WEATHER]}
            whole = (await fake.client.post("/api/chat", json=body | {"stream": False})).json()
            assert whole["message"] == {"role": "assistant", "content": "Hm.", "tool_calls": calls}
            assert (whole["done_reason"], whole["prompt_eval_duration"]) == ("stop", 100_000_000)
            lines = [json.loads(one) for one in (await fake.client.post("/api/chat", json=body)).text.splitlines()]
            told = [one["message"].get("tool_calls") for one in lines]
            assert told == [None, [calls[0]], [calls[1]], None]
            assert [one["done"] for one in lines] == [False, False, False, True]
            body["messages"] = [*HI, whole["message"], {"role": "tool", "tool_name": "weather", "content": "Rain."}]
            assert (await fake.client.post("/api/chat", json=body)).status_code == 200
            seen: Any = fake.model.seen[-1].prompt
            assert seen.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
            assert seen.messages[2] == {"role": "tool", "content": "Rain.", "name": "weather"}

    asyncio.run(run())


def test_errors_on_the_way_and_what_was_left_out() -> None:
    broken = [Began("", 1), Piece("", 0, "Hm"), WorkerError("the process has ended", kind="Crashed")]
    cut = [Began("", 1, truncated=Truncated(2, 30)), *saying("Yes.")[1:]]

    async def run() -> None:
        async with faked(lambda call: cut if call.prompt.truncate else broken) as fake:
            body: dict[str, Any] = {"model": "fake", "messages": HI}
            lines = (await fake.client.post("/api/chat", json=body)).text.splitlines()
            assert json.loads(lines[-1]) == {"error": "the process has ended"}
            answer = await fake.client.post("/api/chat", json=body | {"truncate": True})
            assert answer.headers["x-herd-truncated"] == "messages=2; tokens=30"

    asyncio.run(run())


def test_how_long_a_model_stays() -> None:
    async def run() -> None:
        async with faked(lambda call: saying("Yes."), any_model=True, models=()) as fake:
            body: dict[str, Any] = {"model": "fake", "messages": HI, "stream": False}
            slot = fake.state.models.add(ModelSpec(source="fake", name="fake", keep_alive=None))
            for given, kept in ((10, 10.0), ("1h30m", 5400.0), (-1, None), (None, None), ("90s", 90.0)):
                await fake.client.post("/api/chat", json=body | {"keep_alive": given})
                assert slot.keep_alive == kept
            [row] = (await fake.client.get("/api/ps")).json()["models"]
            left = datetime.datetime.fromisoformat(row["expires_at"]) - datetime.datetime.now(datetime.UTC)
            assert 80 < left.total_seconds() < 91
            assert (await fake.client.post("/api/generate", json={"model": "fake", "keep_alive": 0})).status_code == 200
            assert slot.state == "unloaded"
            assert slot.keep_alive is None, "as it was set up"

    asyncio.run(run())


def test_clients_do_not_change_how_long_a_named_model_stays() -> None:
    async def run() -> None:
        async with faked(lambda call: saying("Yes.")) as fake:
            slot = fake.state.models.slots["fake"]
            for path, more in (("chat", {"messages": HI}), ("chat", {}), ("generate", {}), ("embed", {"input": "a"})):
                for given in (0, "5m", 1e-9):
                    body = {"model": "fake", "stream": False, "keep_alive": given} | more
                    if path == "embed":
                        del body["stream"]
                    answer = await fake.client.post(f"/api/{path}", json=body)
                    assert (answer.status_code, answer.json()["error"][:11]) == (400, "keep_alive:"), answer.text
            assert slot.keep_alive is None
            for given in (-1, None):
                body = {"model": "fake", "messages": HI, "stream": False, "keep_alive": given}
                assert (await fake.client.post("/api/chat", json=body)).status_code == 200, "that is what it does"
            assert (slot.state, slot.keep_alive) == ("ready", None)

    asyncio.run(run())


def test_durations() -> None:
    assert [seconds_of(one) for one in (None, 5, "5m", "1.5h", "250ms", "-1", "-5m", "30")] == [
        None,
        5,
        300,
        5400,
        0.25,
        FOREVER,
        FOREVER,
        30,
    ]


def test_only_servers_of_a_whole_machine_change_it() -> None:
    async def run() -> None:
        async with faked(lambda call: saying("Yes.")) as fake:
            for method, path in (("POST", "pull"), ("DELETE", "delete")):
                answer = await fake.client.request(method, f"/api/{path}", json={"model": "x"})
                assert answer.status_code == 403

    asyncio.run(run())
