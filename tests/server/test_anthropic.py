"""`/v1/messages` with Anthropic's own client on a live server, and over a model that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from herd.server.process import WorkerError
from herd.server.protocol import Began, Ended, Finished, Piece, ToolPiece, Usage
from tests.server.conftest import Live, faked
from tests.server.fakes import saying

PATIENCE = 300
"""Seconds: models are loaded on the way, and a busy machine takes a while."""
HI: Any = [{"role": "user", "content": "Tell me a story about a dog."}]
COLD: Any = {"extra_body": {"temperature": 0}}
"""The newest version of the API has no temperature; this server takes it, and so do clients this way."""
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(live: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0, timeout=PATIENCE) as made:
        yield made


def test_plain_and_streamed_are_the_same(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": "nano", "max_tokens": 24, "messages": HI, "system": "Be brief.", **COLD}
    whole = client.messages.create(**asked)
    assert whole.type == "message"
    assert whole.role == "assistant"
    assert whole.id.startswith("msg_")
    assert (whole.stop_reason, whole.stop_sequence) == ("max_tokens", None)
    assert whole.usage.output_tokens == 24
    with client.messages.stream(**asked) as stream:
        names = [event.type for event in stream if event.type not in ("text", "ping")]
        final = stream.get_final_message()
    assert final.content[0].model_dump() == whole.content[0].model_dump()
    assert final.content[0].type == "text"
    assert final.content[0].text
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert final.stop_reason == "max_tokens"
    cached = final.usage.cache_read_input_tokens
    assert cached, "the second prompt was found in the cache"
    assert final.usage.input_tokens + cached == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_count_is_that_of_the_prompt(client: anthropic.Anthropic) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": " Two."}]}]
    asked: Any = {"model": "json", "messages": parts, "system": "Hm.", "tools": [WEATHER]}
    counted = client.messages.count_tokens(**asked).input_tokens
    made = client.messages.create(**asked, max_tokens=1)
    assert counted == made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
    assert counted > client.messages.count_tokens(model="json", messages=parts, system="Hm.").input_tokens


def test_stop_sequences(client: anthropic.Anthropic) -> None:
    first = client.messages.create(model="nano", max_tokens=32, messages=HI, **COLD)
    assert first.content[0].type == "text"
    word = first.content[0].text.split()[3]
    made = client.messages.create(model="nano", max_tokens=32, messages=HI, **COLD, stop_sequences=["@@", word])
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", word)
    assert made.content[0].type == "text"
    assert first.content[0].text.startswith(made.content[0].text)
    assert word not in made.content[0].text


@pytest.mark.parametrize("model", ["json", "python"])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_calls_of_tools_and_their_results(client: anthropic.Anthropic, model: str, choice: Any) -> None:
    asked: Any = {"model": model, "messages": HI, "max_tokens": 500, "tools": [WEATHER], **COLD}
    chosen = choice | {"disable_parallel_tool_use": True}
    made = client.messages.create(**asked, tool_choice=chosen)
    assert made.stop_reason == "tool_use"
    [call] = made.content
    assert call.type == "tool_use"
    assert call.name == "weather"
    assert call.id.startswith("toolu_")
    assert set(call.input) == {"city", "days"}
    with client.messages.stream(**asked, tool_choice=chosen) as stream:
        streamed = stream.get_final_message()
    assert streamed.stop_reason == "tool_use"
    assert streamed.content[0].model_dump(exclude={"id"}) == call.model_dump(exclude={"id"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "No such city."}]}
    again: Any = [
        *HI,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in made.content]},
        {"role": "user", "content": [{**result, "is_error": True}, {"type": "text", "text": "And now?"}]},
    ]
    after = client.messages.create(
        model=model, messages=again, max_tokens=4, tools=[WEATHER], tool_choice={"type": "none"}
    )
    assert after.stop_reason in ("max_tokens", "end_turn")


def test_a_schema_holds(client: anthropic.Anthropic) -> None:
    schema = WEATHER["input_schema"]
    made = client.messages.create(
        model="json",
        messages=HI,
        max_tokens=400,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert made.stop_reason == "end_turn"
    assert made.content[0].type == "text"
    assert set(json.loads(made.content[0].text)) == {"city", "days"}


def test_an_answer_that_was_begun_is_gone_on_with(client: anthropic.Anthropic) -> None:
    begun: Any = [*HI, {"role": "assistant", "content": "Once there was a dog called"}]
    made = client.messages.create(model="nano", max_tokens=6, messages=begun, **COLD)
    plain = client.messages.create(model="nano", max_tokens=6, messages=HI, **COLD)
    assert made.content != plain.content


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 1.5}, "temperature"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"mcp_servers": [{"name": "a"}]}, "mcp_servers"),
    ({"container": "a"}, "container"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]}]},
        "tool_use_id",
    ),
    ({"output_config": {"effort": "high"}}, "effort"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, "nothing"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"model": "gpt-4"}, "gpt-4"),
]


@pytest.mark.parametrize(("more", "named"), WRONG, ids=[named for _, named in WRONG])
def test_what_cannot_be_honoured_is_named(http: httpx.Client, more: dict[str, Any], named: str) -> None:
    body = {k: v for k, v in ({"model": "json", "max_tokens": 8, "messages": HI} | more).items() if v is not None}
    answer = http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"})
    said = answer.json()
    assert answer.status_code == (404 if named == "gpt-4" else 400), said
    assert said["type"] == "error"
    assert said["error"]["type"] == ("not_found_error" if named == "gpt-4" else "invalid_request_error")
    assert named in said["error"]["message"]


def test_errors_are_those_of_the_client(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nano"):
        client.messages.create(model="claude", max_tokens=5, messages=HI)
    long: Any = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(anthropic.BadRequestError, match="512"):
        client.messages.create(model="nano", max_tokens=5, messages=long)
    with pytest.raises(anthropic.BadRequestError, match="anthropic-version"):
        client.messages.create(
            model="nano", max_tokens=5, messages=HI, extra_headers={"anthropic-version": "2023-01-01"}
        )


def test_events_of_text_then_calls_and_of_an_error() -> None:
    script = [
        Began("", 7),
        Piece("", 0, "Let me"),
        Piece("", 0, " see."),
        Piece("", 0, tool=ToolPiece(0, "call_ab", "weather")),
        Piece("", 0, tool=ToolPiece(0, arguments='{"city":')),
        Piece("", 0, tool=ToolPiece(0, arguments='"Oslo"}')),
        Piece("", 0, tool=ToolPiece(1, "call_cd", "clock")),
        Ended("", 0, "tool_calls", None, 9),
        Finished("", Usage(7, 9, 4, 0.1, 0.2)),
    ]
    broken = [Began("", 1), Piece("", 0, "Hm"), WorkerError("the process has ended", kind="Crashed")]

    async def run() -> None:
        async with faked(lambda call: broken if "broken" in str(call.prompt) else script) as fake:
            body = {"model": "fake", "max_tokens": 50, "messages": HI, "tools": [WEATHER]}
            answer = await fake.client.post("/v1/messages", json=body | {"stream": True})
            events = _events(answer.text)
            assert [name for name, _ in events] == [
                "message_start",
                "content_block_start",
                "content_block_delta",
                "content_block_delta",
                "content_block_stop",
                "content_block_start",
                "content_block_delta",
                "content_block_delta",
                "content_block_stop",
                "content_block_start",
                "content_block_stop",
                "message_delta",
                "message_stop",
            ]
            assert all(name == data["type"] for name, data in events)
            assert [data["index"] for _, data in events if "index" in data] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
            assert events[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
            assert events[-2][1]["usage"]["input_tokens"] == 3
            assert events[-2][1]["usage"]["cache_read_input_tokens"] == 4
            whole = (await fake.client.post("/v1/messages", json=body)).json()
            assert whole["content"] == [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "toolu_ab", "name": "weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "toolu_cd", "name": "clock", "input": {}},
            ]
            body |= {"messages": [{"role": "user", "content": "broken"}], "stream": True}
            events = _events((await fake.client.post("/v1/messages", json=body)).text)
            assert events[-1][0] == "error"
            assert events[-1][1]["error"] == {"type": "overloaded_error", "message": "the process has ended"}

    asyncio.run(run())


def test_turns_are_joined_as_anthropic_says() -> None:
    async def run() -> None:
        async with faked(lambda call: saying("Yes.")) as fake:
            body: Any = {
                "model": "fake",
                "max_tokens": 5,
                "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "user", "content": [{"type": "text", "text": "b"}]},
                    {"role": "assistant", "content": "c"},
                ],
            }
            assert (await fake.client.post("/v1/messages", json=body)).status_code == 200
            chat: Any = fake.model.seen[-1].prompt
            assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
            assert chat.messages[1]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
            assert chat.continue_final

    asyncio.run(run())


def _events(text: str) -> list[tuple[str, Any]]:
    out = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        out.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return out
