"""`/v1/responses` with the real client on a live server, and over a model that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from herd.server.process import WorkerError
from herd.server.protocol import Began, Chat, Ended, Finished, Piece, TokenInfo, ToolPiece, Usage
from herd.server.stored import Entry, Stored
from tests.server.conftest import Live, faked
from tests.server.fakes import saying

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
    },
    "strict": True,
}
ASKED = {"model": "fake", "input": "Hi"}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_streamed_events_make_the_whole_response(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "nano", "input": "Tell me a story.", "max_output_tokens": 20, "temperature": 0,
        "instructions": "You are kind.", "metadata": {"a": "b"},
    }  # fmt: skip
    whole = client.responses.create(**asked)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output_text
    assert whole.metadata == {"a": "b"}
    assert whole.usage is not None
    assert whole.usage.output_tokens == 20
    assert whole.usage.total_tokens == whole.usage.input_tokens + 20
    events = list(client.responses.create(**asked, stream=True))
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(one.type for one in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == text
    assert events[0].response.id == events[-1].response.id


def test_the_clients_own_helper_for_streams(client: openai.OpenAI) -> None:
    """It puts the events together itself, and is strict about their order."""
    with client.responses.stream(model="nano", input="Tell me a story.", max_output_tokens=8) as stream:
        deltas = [one.delta for one in stream if one.type == "response.output_text.delta"]
        snapshot = stream._state._ResponseStreamState__current_snapshot  # type: ignore[attr-defined]
    assert snapshot.output[0].content[0].text == "".join(deltas)


def test_a_conversation_goes_on_from_what_was_stored(client: openai.OpenAI, http: httpx.Client) -> None:
    first = client.responses.create(model="nano", input="Tell me a story.", max_output_tokens=8, temperature=0)
    second = client.responses.create(
        model="nano", input="And then?", previous_response_id=first.id, max_output_tokens=8, temperature=0
    )
    assert second.previous_response_id == first.id
    same = http.post(
        "/v1/chat/completions",
        json={
            "model": "nano",
            "messages": [
                {"role": "user", "content": "Tell me a story."},
                {"role": "assistant", "content": first.output_text},
                {"role": "user", "content": "And then?"},
            ],
            "max_tokens": 8,
            "temperature": 0,
        },
    ).json()
    assert same["choices"][0]["message"]["content"] == second.output_text
    assert second.usage is not None
    assert same["usage"]["prompt_tokens"] == second.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    items = client.responses.input_items.list(second.id, order="asc", limit=2)
    assert items.has_more
    every = list(items)  # the client turns the pages
    assert [getattr(item, "role", None) for item in every] == ["user", "assistant", "user"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="there is no response") as refused:
        client.responses.create(model="nano", input="?", previous_response_id=first.id)
    assert refused.value.code == "previous_response_not_found"
    third = client.responses.create(
        model="nano", input="?", previous_response_id=second.id, max_output_tokens=1
    )  # fmt: skip
    assert third.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens, (
        "what was forgotten is still part of what goes on from it"
    )


def test_input_tokens_are_those_of_the_response(client: openai.OpenAI) -> None:
    asked: Any = {"model": "json", "input": "Rain?", "instructions": "Be brief.", "tools": [WEATHER]}
    counted = client.responses.input_tokens.count(**asked)
    made = client.responses.create(**asked, max_output_tokens=1)
    assert made.usage is not None
    assert counted.input_tokens == made.usage.input_tokens
    more: Any = {"model": "json", "input": "Go on.", "previous_response_id": made.id}
    longer = client.responses.input_tokens.count(**more)
    made = client.responses.create(**more, max_output_tokens=1)
    assert made.usage is not None
    assert longer.input_tokens == made.usage.input_tokens


def test_what_is_not_stored_is_not_found(client: openai.OpenAI) -> None:
    made = client.responses.create(model="nano", input="Hi.", max_output_tokens=2, store=False)
    assert made.store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_outputs(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {
        "model": "json", "input": "Rain?", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False, "seed": 3, "temperature": 1, "extra_body": {},
    }  # fmt: skip
    asked["extra_body"]["seed"] = asked.pop("seed")
    if stream:
        events = list(client.responses.create(**asked, stream=True))
        made = events[-1].response  # type: ignore[union-attr]
        pieces = "".join(one.delta for one in events if one.type == "response.function_call_arguments.delta")
        done = next(one for one in events if one.type == "response.function_call_arguments.done")
        assert done.arguments == pieces
        added = next(one for one in events if one.type == "response.output_item.added")
        assert added.item.type == "function_call"
        assert added.item.arguments == ""
    else:
        made = client.responses.create(**asked)
    (call,) = made.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert set(json.loads(call.arguments)) == {"city"}
    assert made.status == "completed"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sun."}
    answer = client.responses.create(
        model="json", input=[output], previous_response_id=made.id, tools=[WEATHER], max_output_tokens=5
    )
    sent_back: Any = [{"role": "user", "content": "Rain?"}, call.model_dump(exclude_none=True), output]
    again = client.responses.create(model="json", input=sent_back, tools=[WEATHER], max_output_tokens=5)
    assert answer.usage is not None
    assert again.usage is not None
    assert answer.usage.input_tokens == again.usage.input_tokens


def test_a_schema_is_kept_and_logprobs_are_told(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 1}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    form: Any = {"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}}
    made = client.responses.create(
        model="json", input="A number.", text=form, include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert 1 <= json.loads(made.output_text)["n"] <= 9
    part = made.output[0].content[0]  # type: ignore[union-attr]
    assert part.type == "output_text"  # type: ignore[union-attr]
    told = part.logprobs  # type: ignore[union-attr]
    assert b"".join(bytes(one.bytes) for one in told).decode() == made.output_text
    assert all(len(one.top_logprobs) == 2 for one in told)


def test_a_long_conversation_is_shortened_only_when_asked(client: openai.OpenAI, http: httpx.Client) -> None:
    items: Any = [
        {"role": role, "content": f"Turn {i}. " + "many words " * 40} for i in range(40) for role in ("user", "assistant")
    ]  # fmt: skip
    items.append({"role": "user", "content": "Go on."})
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="nano", input=items, max_output_tokens=4)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "input"
    answer = http.post(
        "/v1/responses", json={"model": "nano", "input": items, "max_output_tokens": 4, "truncation": "auto"}
    )  # fmt: skip
    assert answer.json()["truncated"]["dropped_messages"] > 0
    assert answer.headers["X-Herd-Truncated"].startswith("messages=")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f", "colour": 1}]}, "tools[0].colour"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"n": 2}, "n"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": ["message"], "role": "user", "content": "a"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "a", "name": "b"}]}, "input[0].name"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"previous_response_id": "resp_nothing"}, "previous_response_id"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"stream_options": {"include_usage": True}, "stream": True}, "stream_options.include_usage"),
    ],
)
def test_what_is_refused_is_named(more: dict[str, Any], param: str) -> None:
    async def run() -> httpx.Response:
        async with faked() as fake:
            return await fake.client.post("/v1/responses", json=ASKED | more)

    answer = asyncio.run(run())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_text_and_calls_are_items_of_their_own() -> None:
    script = [
        Began("", 3),
        Piece("", 0, "Let me look."),
        Piece("", 0, "", ToolPiece(0, "call_1", "f")),
        Piece("", 0, "", ToolPiece(0, arguments='{"a":')),
        Piece("", 0, "", ToolPiece(0, arguments=" 1}")),
        Piece("", 0, "", ToolPiece(1, "call_2", "g")),
        Ended("", 0, "tool_calls", None, 5),
        Finished("", Usage(3, 5)),
    ]

    async def run() -> None:
        async with faked(lambda call: script) as fake:
            made = (await fake.client.post("/v1/responses", json=ASKED)).json()
            assert [item["type"] for item in made["output"]] == ["message", "function_call", "function_call"]
            assert [item["status"] for item in made["output"]] == ["completed"] * 3
            assert made["output"][1]["arguments"] == '{"a": 1}'
            assert made["output"][2]["call_id"] == "call_2"
            streamed = (await fake.client.post("/v1/responses", json=ASKED | {"stream": True})).text
            blocks = [block.split("\n") for block in streamed.split("\n\n") if block]
            assert all(name == f"event: {json.loads(data[6:])['type']}" for name, data in blocks)
            last = json.loads(blocks[-1][1][6:])["response"]
            assert [{**item, "id": ""} for item in last["output"]] == [{**item, "id": ""} for item in made["output"]]

    asyncio.run(run())


def test_errors_on_the_way() -> None:
    script = [Began("", 3), Piece("", 0, "Hel"), WorkerError("the engine broke", kind="HerdError")]

    async def run() -> None:
        async with faked(lambda call: script) as fake:
            streamed = (await fake.client.post("/v1/responses", json=ASKED | {"stream": True})).text
            last = json.loads(streamed.strip().rpartition("data: ")[2])
            assert last["type"] == "response.failed"
            assert last["response"]["error"]["message"] == "the engine broke"
            assert last["response"]["output"][0]["status"] == "incomplete"
            kept = await fake.client.get(f"/v1/responses/{last['response']['id']}")
            assert kept.json()["status"] == "failed"
            answer = await fake.client.post(
                "/v1/responses", json=ASKED | {"previous_response_id": last["response"]["id"]}
            )
            assert answer.status_code == 400
            assert (await fake.client.post("/v1/responses", json=ASKED)).status_code == 500

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_cancelled_from_another_connection(stream: bool) -> None:
    async def run() -> None:
        async with faked(lambda call: [Began("", 3), Piece("", 0, "Hel"), 30.0, *saying("lo")[1:]]) as fake:
            asking = asyncio.create_task(fake.client.post("/v1/responses", json=ASKED | {"stream": stream}))
            while not fake.state.stored._entries:
                await asyncio.sleep(0.01)
            (id,) = fake.state.stored._entries
            assert (await fake.client.get(f"/v1/responses/{id}")).json()["status"] == "in_progress"
            assert (await fake.client.delete(f"/v1/responses/{id}")).status_code == 409
            cancelled = await fake.client.post(f"/v1/responses/{id}/cancel")
            assert cancelled.json()["status"] == "cancelled"
            answer = await asyncio.wait_for(asking, 5)
            assert answer.status_code == 200
            assert '"status":"cancelled"' in answer.text.replace(" ", "")
            assert len(fake.model.cancelled) == 1, "the engine was told"
            assert (await fake.client.post(f"/v1/responses/{id}/cancel")).status_code == 200
            assert (await fake.client.delete(f"/v1/responses/{id}")).json()["deleted"] is True

    asyncio.run(run())


def test_what_cannot_be_cancelled_and_bad_queries() -> None:
    async def run() -> None:
        async with faked() as fake:
            id = (await fake.client.post("/v1/responses", json=ASKED)).json()["id"]
            assert (await fake.client.post(f"/v1/responses/{id}/cancel")).status_code == 400
            assert (await fake.client.get(f"/v1/responses/{id}?stream=true")).status_code == 400
            for query in (
                "limit=0",
                "limit=101",
                "limit=many",
                "order=up",
                "after=nothing",
                "before=x",
                "order=asc&order=desc",
            ):
                answer = await fake.client.get(f"/v1/responses/{id}/input_items?{query}")
                assert answer.json()["error"]["param"] == query.partition("=")[0]
            for path in ("", "/input_items"):
                assert (await fake.client.get(f"/v1/responses/resp_none{path}")).status_code == 404
            assert (await fake.client.post("/v1/responses/resp_none/cancel")).status_code == 404

    asyncio.run(run())


def test_only_allowed_tools_are_offered() -> None:
    other = {"type": "function", "name": "other"}

    async def run() -> None:
        async with faked() as fake:
            choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
            more = {"tools": [WEATHER, other], "tool_choice": choice}
            made = (await fake.client.post("/v1/responses", json=ASKED | more)).json()
            assert made["tool_choice"]["mode"] == "required"
            assert [tool["name"] for tool in made["tools"]] == ["weather", "other"]
            prompt = fake.model.seen[-1].prompt
            assert isinstance(prompt, Chat)
            assert [tool["function"]["name"] for tool in prompt.tools] == ["other"]
            assert prompt.tool_choice == "required"

    asyncio.run(run())


def test_stored_responses_have_an_owner_and_a_limit() -> None:
    kept = Stored(most=3, most_bytes=1 << 20)
    for i in range(4):
        kept.put(Entry(f"r{i}", "me", {"output": []}, [{"x": i}]))
    assert kept.find("r0", "me") is None
    assert kept.find("r3", "me") is not None
    assert kept.find("r3", "you") is None
    kept.put(Entry("r4", "me", {"output": [{"x": "x" * (1 << 20)}]}, []))
    assert len(kept) == 3, "what is too large alone is not kept"
    kept.put(Entry("r5", "me", {"output": [{"x": "x" * (1 << 19)}]}, []))
    kept.put(Entry("r6", "me", {"output": [{"x": "x" * (1 << 19)}]}, []))
    assert kept.find("r5", "me") is None
    assert kept.find("r6", "me") is not None


def test_what_conversations_share_is_counted_once_and_for_as_long_as_it_is_kept() -> None:
    kept = Stored(most=3, most_bytes=1 << 20)
    long: dict[str, Any] = {"text": "x" * (400 << 10)}
    kept.put(Entry("first", "me", {"output": []}, [long]))
    once = kept.nbytes
    assert once > 400 << 10
    for i in range(3):  # each has the long item, too, and the first one is forgotten
        kept.put(Entry(f"r{i}", "me", {"output": []}, [long, {"i": i}]))
    assert kept.find("first", "me") is None
    assert 400 << 10 < kept.nbytes < once + (50 << 10), "the item is held by the later ones, and counted, once"
    kept.put(Entry("r2", "me", {"output": []}, [long]))
    assert kept.nbytes < once + (50 << 10), "put again"
    kept.put(Entry("other", "me", {"output": [{"text": "y" * (700 << 10)}]}, []))
    assert kept.find("r2", "me") is None, "there is no room for both"
    assert kept.nbytes < 1 << 20
    kept.put(Entry("large", "me", {"output": []}, [long, {"text": "z" * (700 << 10)}]))
    assert kept.find("large", "me") is None, "the whole conversation is larger than the room"
    assert kept.find("other", "me") is not None
    kept.drop("other")
    assert (len(kept), kept.nbytes) == (0, 0)


def test_a_conversation_has_its_limits() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}" + " " * 3000}

    async def run() -> None:
        async with faked(max_prompt_work=2500) as fake:
            answer = await fake.client.post("/v1/responses", json=ASKED | {"input": [call]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_much_work"), "arguments count"
        async with faked() as fake:
            given = [{"role": "user", "content": "x"}] * 2000
            first = (await fake.client.post("/v1/responses", json=ASKED | {"input": given})).json()["id"]
            again = {"input": given, "previous_response_id": first}
            second = await fake.client.post("/v1/responses", json=ASKED | again)
            assert second.status_code == 200
            third = await fake.client.post(
                "/v1/responses", json=ASKED | again | {"previous_response_id": second.json()["id"]}
            )
            assert (third.status_code, third.json()["error"]["code"]) == (400, "too_much_work")

    asyncio.run(run())


def test_what_was_not_kept_is_not_promised_afterwards() -> None:
    """`include` of a response that was made without log-probabilities names what is missing, where it was ignored before."""

    async def run() -> None:
        token = TokenInfo(5, "Hello", b"Hello", -0.5)
        told = [*saying("Hello")[:1], Piece("", 0, "Hello", tokens=(token,)), *saying("Hello")[2:]]
        async with faked(lambda call: told if "logprobs" in call.sampling else saying("Hello")) as fake:
            asked = {"model": "fake", "input": "Hi"}
            without = (await fake.client.post("/v1/responses", json=asked)).json()["id"]
            more = asked | {"include": ["message.output_text.logprobs"]}
            having = (await fake.client.post("/v1/responses", json=more)).json()["id"]
            after = asked | {"previous_response_id": without}
            later = (await fake.client.post("/v1/responses", json=after)).json()["id"]
            query = "?include=message.output_text.logprobs"
            for path, status in (
                (f"{without}", 400), (f"{having}", 200), (f"{later}/input_items", 400), (f"{having}/input_items", 200),
            ):  # fmt: skip
                assert (await fake.client.get(f"/v1/responses/{path}")).status_code == 200
                answer = await fake.client.get(f"/v1/responses/{path}{query}")
                assert answer.status_code == status, answer.text
                if status == 400:
                    assert answer.json()["error"]["param"] == "include"

    asyncio.run(run())
