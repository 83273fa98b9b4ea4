"""`/v1/chat/completions` on a live server with herd-nano, and over a model that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from herd.server.process import WorkerError
from herd.server.protocol import Began, Ended, Finished, Piece, ToolPiece, Usage
from tests.server.conftest import Live, faked
from tests.server.fakes import saying

HI = [{"role": "user", "content": "Tell me a story about a dog."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_plain_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="nano", messages=HI, max_tokens=24, seed=5, temperature=1)
    streamed = client.chat.completions.create(
        model="nano",
        messages=HI,
        max_tokens=24,
        seed=5,
        temperature=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert next(chunk.choices[0].delta.role for chunk in chunks if chunk.choices) == "assistant"
    assert (
        [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
        == whole.choices[0].finish_reason
        == "length"
    )
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 24)
    assert not chunks[-1].choices
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens, "the second prompt was found in the cache"
    assert whole.system_fingerprint == chunks[0].system_fingerprint
    assert len({chunk.id for chunk in chunks}) == 1


def test_replies_to_n_differ_and_repeat(client: openai.OpenAI) -> None:
    def texts() -> list[str | None]:
        made = client.chat.completions.create(model="nano", messages=HI, n=3, seed=-7, max_tokens=12, temperature=1.2)
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        return [choice.message.content for choice in made.choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


def test_logprobs_are_of_the_tokens_of_the_text(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="nano", messages=HI, max_tokens=10, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = made.choices[0]
    assert choice.logprobs is not None
    told = choice.logprobs.content
    assert told is not None
    assert len(told) == 10
    assert b"".join(bytes(token.bytes or ()) for token in told).decode() == choice.message.content
    for token in told:
        assert token.logprob <= 0
        assert token.top_logprobs[0].token == token.token, "at temperature 0 the likeliest token is chosen"
        assert len(token.top_logprobs) == 3


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="nano", messages=HI, max_tokens=40, temperature=0, logprobs=True)
    text = whole.choices[0].message.content or ""
    stop = text.split()[3]
    cut = client.chat.completions.create(
        model="nano", messages=HI, max_tokens=40, temperature=0, stop=stop, logprobs=True
    )
    choice = cut.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == text[: text.index(stop)]
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] == stop
    assert choice.logprobs is not None
    said = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content or ())
    assert said.decode().startswith(choice.message.content or "-")
    assert len(said) - len((choice.message.content or "").encode()) < 12, "no tokens behind the stop string are told"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_are_calls(client: openai.OpenAI, choice: Any) -> None:
    made = client.chat.completions.create(
        model="json", messages=[{"role": "user", "content": "Rain?"}], tools=[WEATHER], tool_choice=choice,
        parallel_tool_calls=False, seed=1, temperature=1,
    )  # fmt: skip
    (call,) = made.choices[0].message.tool_calls or ()
    assert made.choices[0].finish_reason == "tool_calls"
    assert made.choices[0].message.content is None
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    assert 1 <= arguments["days"] <= 9
    assert call.id.startswith("call_")


def test_streamed_calls_name_the_function_first(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="json", messages=[{"role": "user", "content": "Rain?"}], tools=[WEATHER], tool_choice="required",
        parallel_tool_calls=False, stream=True, seed=2,
    )  # fmt: skip
    pieces = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert pieces[0].function is not None
    assert pieces[0].function.name == "weather"
    assert pieces[0].id
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces if piece.function))["city"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_python_calls_and_strict_ones(client: openai.OpenAI, strict: bool) -> None:
    """The other dialect, and tools that are strict with tool_choice auto: text, or calls that follow the schema."""
    tool: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}} if strict else WEATHER
    for seed in range(4):
        made = client.chat.completions.create(
            model="python", messages=[{"role": "user", "content": "Rain?"}], tools=[tool], seed=seed, temperature=1,
            tool_choice="auto" if strict else "required", parallel_tool_calls=seed % 2 == 0, max_tokens=300,
            logit_bias={str(ord("[")): 20} if strict else {},
        )  # fmt: skip
        calls = made.choices[0].message.tool_calls or []
        assert calls
        assert made.choices[0].finish_reason in ("tool_calls", "length")
        if made.choices[0].finish_reason == "tool_calls":
            assert len(calls) == 1 or seed % 2 == 0
            for call in calls:
                assert set(json.loads(call.function.arguments)) == {"city", "days"}


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    made = client.chat.completions.create(
        model="nano", messages=HI, seed=3, temperature=1,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
    )  # fmt: skip
    value = json.loads(made.choices[0].message.content or "")
    assert set(value) == {"name", "age"}


BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"messages": HI, "nonsense": 1}, 400, "nonsense", "unknown_parameter"),
    ({"messages": [{"role": "user", "content": "x", "nonsense": 1}]}, 400, "messages[0].nonsense", "unknown_parameter"),
    ({"messages": HI, "temperature": -1}, 400, "temperature", "invalid_value"),
    ({"messages": HI, "temperature": "hot"}, 400, "temperature", "invalid_type"),
    ({"messages": HI, "n": 10**9}, 400, "n", "invalid_value"),
    ({"messages": HI, "n": 9}, 400, None, "invalid_value"),
    ({"messages": HI, "top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 10**6}, 400, "top_logprobs", "invalid_value"),
    ({"messages": HI, "max_tokens": 10**18 * 100}, 400, "max_tokens", "invalid_value"),
    ({"messages": HI, "max_tokens": 1.5}, 400, "max_tokens", "invalid_type"),
    ({"messages": HI, "stop": ["a"] * 5}, 400, "stop", "invalid_value"),
    ({"messages": HI, "logit_bias": {"a": 1}}, 400, None, "invalid_value"),
    ({"messages": HI, "logit_bias": {"999999": 1}}, 400, None, "invalid_value"),
    ({"messages": HI, "audio": {}}, 400, "audio", "unsupported_parameter"),
    ({"messages": HI, "functions": []}, 400, "functions", "unsupported_parameter"),
    ({"messages": HI, "modalities": ["audio"]}, 400, "modalities", "unsupported_parameter"),
    ({"messages": HI, "stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({}, 400, "messages", "missing_required_parameter"),
    ({"messages": HI, "tools": [WEATHER]}, 400, None, "invalid_prompt"),
    ({"messages": HI, "tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
    ({"messages": [{"role": "user", "content": "word " * 700}]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, 400,
     "messages[0].content[0]", "unsupported_content"),
    ({"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
     400, None, "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "code"), BAD, ids=lambda value: None)
def test_refusals_name_the_field(
    http: httpx.Client, body: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    response = http.post("/v1/chat/completions", json={"model": "nano", **body})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (code, "invalid_request_error"), error
    if param is not None:
        assert error["param"] == param, error


def test_context_overflow_tells_the_counts(http: httpx.Client) -> None:
    response = http.post(
        "/v1/chat/completions", json={"model": "nano", "messages": [{"role": "user", "content": "a " * 600}]}
    )
    assert "512" in response.json()["error"]["message"]


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert caught.value.code == "model_not_found"


def test_leaving_a_stream_frees_everything(live: Live, http: httpx.Client) -> None:
    with http.stream(
        "POST", "/v1/chat/completions", json={"model": "nano", "messages": HI, "stream": True, "ignore_eos": True}
    ) as r:
        next(r.iter_lines())
    until_idle(live)


def test_leaving_a_plain_request_frees_everything(live: Live) -> None:
    with live.client() as client, pytest.raises(httpx.TimeoutException):
        client.post(
            "/v1/chat/completions", json={"model": "nano", "messages": HI, "ignore_eos": True, "n": 8}, timeout=0.05
        )
    until_idle(live)


def until_idle(live: Live) -> None:
    """Until the worker says that it does nothing and holds no blocks."""
    import time

    until = time.monotonic() + 10
    while time.monotonic() < until:
        process = live.state.models.slots["nano"].process
        stats = {} if process is None else process.stats
        if process is not None and not process.calls and stats.get("running") == 0 and stats["blocks_used"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError(f"something still runs: {stats}")


# ---- over a scripted model ---------------------------------------------------------------------------------------------


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], **more}


def test_errors_before_the_first_event_have_their_status() -> None:
    async def run() -> None:
        async with faked(lambda call: [WorkerError("too long", kind="ContextFullError")]) as fake:
            for stream in (False, True):
                response = await fake.client.post("/v1/chat/completions", json=asked(stream=stream))
                assert response.status_code == 400
                assert response.json()["error"]["code"] == "context_length_exceeded"

    asyncio.run(run())


def test_errors_on_the_way_are_events() -> None:
    script = [Began("", 3), Piece("", 0, "Hel"), WorkerError("the engine broke", kind="HerdError")]

    async def run() -> None:
        async with faked(lambda call: script) as fake:
            response = await fake.client.post("/v1/chat/completions", json=asked(stream=True))
            events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["error"]["message"] == "the engine broke"
            response = await fake.client.post("/v1/chat/completions", json=asked())
            assert response.status_code == 500

    asyncio.run(run())


def test_a_full_queue_is_429_and_a_draining_server_503() -> None:
    async def run() -> None:
        async with faked(lambda call: [Began("", 1), 0.2, *saying("x")[1:]], max_queue=1) as fake:
            await fake.client.post("/v1/chat/completions", json=asked())  # loads it: two at once, one in the queue
            posts = [fake.client.post("/v1/chat/completions", json=asked()) for _ in range(5)]
            responses = await asyncio.gather(*posts)
            statuses = sorted(response.status_code for response in responses)
            assert statuses == [200, 200, 200, 429, 429]
            refused = next(response for response in responses if response.status_code == 429)
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            fake.state.draining = True
            assert (await fake.client.post("/v1/chat/completions", json=asked())).status_code == 503

    asyncio.run(run())


def test_tool_pieces_become_deltas() -> None:
    script = [
        Began("", 3),
        Piece("", 0, "", ToolPiece(0, "call_1", "f")),
        Piece("", 0, "", ToolPiece(0, arguments='{"a":')),
        Piece("", 0, "", ToolPiece(0, arguments=" 1}")),
        Ended("", 0, "tool_calls", None, 5),
        Finished("", Usage(3, 5)),
    ]

    async def run() -> None:
        async with faked(lambda call: script) as fake:
            whole = (await fake.client.post("/v1/chat/completions", json=asked())).json()["choices"][0]
            assert whole["finish_reason"] == "tool_calls"
            assert whole["message"]["tool_calls"] == [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
            ]

    asyncio.run(run())


def test_adapters_are_models() -> None:
    async def run() -> None:
        async with faked() as fake:
            for name in ("a", "fake@a"):
                await fake.client.post("/v1/chat/completions", json=asked() | {"model": name})
                assert fake.model.seen[-1].adapter == "a"
            listed = (await fake.client.get("/v1/models")).json()["data"]
            assert [(row["id"], row["parent"]) for row in listed] == [("fake", None), ("a", "fake")]

    asyncio.run(run())


def test_what_openai_says_reaches_the_call() -> None:
    async def run() -> None:
        async with faked() as fake:
            await fake.client.post(
                "/v1/chat/completions",
                json=asked(
                    max_completion_tokens=7, stop="x", seed=-1, logit_bias={"5": 2}, top_k=-1, parallel_tool_calls=False,
                    metadata={"a": "b"}, user="me", store=False, service_tier="auto", tool_choice="none", logprobs=True,
                    tools=[WEATHER], truncation="auto", stop_token_ids=[3], ignore_eos=True, min_p=0.1, temperature=0,
                ),
            )  # fmt: skip
            (call,) = fake.model.seen
            assert call.sampling == {
                "temperature": 0, "max_tokens": 7, "stop": ["x"], "seed": 2**63 - 1, "logit_bias": {"5": 2}, "top_k": 0,
                "logprobs": 0, "stop_ids": [3], "ignore_stop_ids": True, "min_p": 0.1,
            }  # fmt: skip
            assert call.prompt.truncate
            assert (call.prompt.tool_choice, call.prompt.parallel) == ("none", False)

    asyncio.run(run())
