"""What a request may cost: hostile lists end at the first bad item, and answers are bounded before any work."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from herd.server.process import Process
from herd.server.protocol import UP, Chat, Piece, TokenInfo
from herd.server.settings import ModelSpec
from tests.server.conftest import faked

REFUSED_SECONDS = 0.5
"""A million bad items took ten seconds when each became an error; to parse the JSON of them takes a few hundredths."""
MANY = 200_000
LONG = "x" * 31_000


def posted(path: str, body: Any, **settings: Any) -> tuple[httpx.Response, float]:
    """The answer of a server over a scripted model, and its seconds of a core, whatever else the machine does."""

    async def run() -> tuple[httpx.Response, float]:
        async with faked(**settings) as fake:
            await fake.client.post("/v1/completions", json={"model": "fake", "prompt": "x"})  # loads the model
            sent, kind = json.dumps(body), {"content-type": "application/json"}
            began = time.thread_time()
            return await fake.client.post(path, content=sent, headers=kind), time.thread_time() - began

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/detokenize", {"tokens": [-1] * MANY}, "tokens[0]"),
        ("/detokenize", {"tokens": [0] * 1_100_000}, "tokens"),
        ("/v1/completions", {"model": "fake", "prompt": [-1] * MANY}, None),
        ("/v1/completions", {"model": "fake", "prompt": [[-1] * MANY]}, None),
        ("/v1/completions", {"model": "fake", "prompt": "x", "guided_choice": [1] * MANY}, "guided_choice[0]"),
        ("/v1/embeddings", {"model": "fake", "input": [-1] * MANY}, None),
        ("/v1/embeddings", {"model": "fake", "input": [[-1] * MANY]}, None),
        (
            "/v1/chat/completions",
            {"model": "fake", "messages": [{"role": "user", "content": [1] * MANY}]},
            "messages[0].content[0]",
        ),
        (
            "/v1/chat/completions",
            {"model": "fake", "messages": [{"role": "user", "content": "x", "tool_calls": [1] * MANY}]},
            "messages[0].tool_calls[0]",
        ),
        (
            "/v1/chat/completions",
            {"model": "fake", "messages": [{"role": "user", "content": "x"} | {f"a{i}": 1 for i in range(MANY // 4)}]},
            None,
        ),
        ("/v1/chat/completions", {"model": "fake"} | {f"a{i}": 1 for i in range(MANY // 4)}, None),
        ("/v1/messages", {"model": "fake", "max_tokens": 5, "messages": [1] * MANY}, None),
        ("/api/embed", {"model": "fake", "input": [1] * MANY}, None),
    ],
)
def test_hostile_lists_end_at_the_first_bad_item(path: str, body: dict[str, Any], param: str | None) -> None:
    response, seconds = posted(path, body)
    assert response.status_code == 400, response.text[:300]
    assert seconds < REFUSED_SECONDS
    assert len(response.text) < 2000
    if param is not None:
        assert response.json()["error"]["param"] == param, response.text


COMPLETION = {"model": "fake", "prompt": LONG, "max_tokens": 0, "echo": True, "logprobs": 20}
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "n": 128}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", COMPLETION | {"n": 128, "prompt_logprobs": 20}, "prompt_logprobs"),
        ("/v1/completions", COMPLETION | {"n": 128}, "logprobs"),
        ("/v1/completions", COMPLETION | {"n": 128, "stream": True}, "logprobs"),
        ("/v1/completions", {"model": "fake", "prompt": LONG, "prompt_logprobs": 20, "n": 16}, "prompt_logprobs"),
        ("/v1/completions", {"model": "fake", "prompt": "x", "logprobs": 20, "n": 128, "max_tokens": 2000}, "logprobs"),
        ("/v1/completions", {"model": "fake", "prompt": ["x"] * 128, "logprobs": 9, "n": 128}, "logprobs"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 20}, "top_logprobs"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 20, "max_tokens": 2000}, "top_logprobs"),
    ],
)
def test_answers_are_bounded_before_any_work(path: str, body: dict[str, Any], param: str) -> None:
    response, _ = posted(path, body, max_prompt_work=4_000_000 if len(str(body)) > 30_000 else 200_000)
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("too_much_work", param), response.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": "fake", "prompt": "x" * 60_000, "prompt_logprobs": 20}, "prompt_logprobs"),
        ("/v1/completions", COMPLETION | {"prompt": "x" * 60_000}, "logprobs"),
        ("/v1/completions", COMPLETION | {"prompt": [1] * 60_000, "stream": True}, "logprobs"),
        (
            "/v1/chat/completions",
            {"model": "fake", "messages": [{"role": "user", "content": "x" * 60_000}], "prompt_logprobs": 20},
            "prompt_logprobs",
        ),
        ("/tokenize", {"model": "fake", "prompt": "x" * 1_000_001}, "prompt"),
    ],
)
def test_what_a_prompt_makes_an_answer_tell_is_bounded(path: str, body: dict[str, Any], param: str) -> None:
    """It comes from the model in one piece, unlike what is told of a reply."""
    response, _ = posted(path, body)
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("too_much_work", param), response.text


def test_long_answers_of_a_model_are_read_beside_the_loop() -> None:
    """While 20,000 log-probabilities are read, which takes a tenth of a second of the processor, others get their turns."""
    top = tuple((j, "word", b"word", -1.0) for j in range(20))
    told = Piece("call", 0, prompt=tuple(TokenInfo(i, "word", b"word", -1.0, top) for i in range(1000)))

    async def run() -> None:
        process = Process(ModelSpec(source="fake", name="fake"))
        process._calls["call"] = found = asyncio.Queue()
        reader = asyncio.StreamReader()
        for data in UP.frames([told, Piece("call", 0, "last")], lambda message, size: message):
            reader.feed_data(data)
        reader.feed_eof()
        turns = 0
        listening = asyncio.create_task(process._listen(reader))
        while not listening.done():
            await asyncio.sleep(0.002)
            turns += 1
        assert (found.get_nowait(), found.get_nowait().text) == (told, "last"), "in their order"
        assert turns > 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/completions", {"model": "fake", "prompt": "x", "n": 128, "logprobs": 5}),
        ("/v1/completions", {"model": "fake", "prompt": "x", "logprobs": 20, "max_tokens": 10**15}),
        ("/v1/chat/completions", CHAT | {"n": 1, "top_logprobs": 20}),
        ("/v1/chat/completions", CHAT | {"n": 1}),
    ],
)
def test_what_is_usual_is_answered(path: str, body: dict[str, Any]) -> None:
    response, _ = posted(path, body)
    assert response.status_code == 200, response.text[:300]


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "' + "x" * 900 + '"}'}}
USER = {"role": "user", "content": "x"}
TOOL = {"name": "f", "description": "x" * 900, "parameters": {"type": "object"}}
CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": CALLED}),
        ("/v1/chat/completions", {"messages": [USER], "tools": [{"type": "function", "function": TOOL}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function"} | TOOL]}),
        ("/v1/responses/input_tokens", {"input": "x", "tools": [{"type": "function"} | TOOL]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x" * 900}]}),
        ("/tokenize", {"prompt": "x" * 900}),
        ("/tokenize", {"messages": CALLED}),
        ("/api/chat", {"messages": [USER], "tools": [{"type": "function", "function": TOOL}]}),
    ],
)
def test_all_of_a_prompt_counts(path: str, body: dict[str, Any]) -> None:
    response, _ = posted(path, {"model": "fake"} | body, max_prompt_work=800)
    assert response.status_code == 400, response.text[:300]
    assert "more than this server takes at once" in response.text
    assert posted(path, {"model": "fake"} | body)[0].status_code != 400


PART = {"type": "input_text", "text": "x"}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/chat/completions?x=1", {"messages": [USER]}, "x"),
        ("/v1/completions?api-version=1", {"prompt": "x"}, "api-version"),
        ("/v1/embeddings?x=1", {"input": "x"}, "x"),
        ("/v1/messages?x=1", {"messages": [USER], "max_tokens": 2}, "x"),
        ("/v1/responses?x=1", {"input": "x"}, "x"),
        ("/tokenize?x=1", {"prompt": "x"}, "x"),
        ("/api/chat?x=1", {"messages": [USER]}, "x"),
        ("/v1/chat/completions", {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        (
            "/v1/chat/completions",
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL | {"index": 3}]}]},
            "tool_calls",
        ),
        ("/v1/responses", {"input": [{"role": "user", "content": [PART | {"refusal": "no"}]}]}, "input_text"),
        ("/v1/responses", {"input": [{"role": "user", "content": [PART | {"logprobs": [1]}]}]}, "logprobs"),
        ("/api/show", {"name": "other"}, "name"),
        ("/api/pull", {"name": "other"}, "name"),
    ],
)
def test_what_changes_nothing_is_refused(path: str, body: dict[str, Any], named: str) -> None:
    response, _ = posted(path, {"model": "fake"} | body, any_model=path == "/api/pull")
    assert response.status_code == 400, response.text[:300]
    assert named in response.text


READS = (
    "/health", "/version", "/metrics", "/v1/engine", "/v1/models", "/v1/models/fake", "/api/tags", "/api/ps", "/api/version",
    "/lora-adapters", "/v1/files", "/v1/files/x", "/v1/files/x/content", "/v1/batches", "/v1/batches/x", "/v1/responses/x",
    "/v1/responses/x/input_items",
)  # fmt: skip
ENDS = ("/v1/files/x", "/v1/responses/x", "/api/delete")


def test_no_route_ignores_a_query(tmp_path: Path) -> None:
    """All routes of the document: a parameter that none of them has is named, and what they have is said in the document."""

    async def run() -> None:
        async with faked(state_dir=str(tmp_path), any_model=True) as fake:
            document = (await fake.client.get("/openapi.json")).json()
            for path, methods in document["paths"].items():
                for method in methods:
                    answer = await fake.client.request(
                        method.upper(), path.replace("{", "").replace("}", "") + "?nope=1"
                    )
                    assert answer.status_code == 400, (method, path, answer.text)
                    assert "unknown query parameter: nope" in answer.text, (method, path, answer.text)
            for method, paths in (("GET", READS), ("DELETE", ENDS)):
                for path in paths:
                    answer = await fake.client.request(method, path + "?nope=1")
                    assert (answer.status_code, "nope" in answer.text) == (400, True), (method, path)
            for page in ("/?conversation=1", "/engine?x=1"):
                assert (await fake.client.get(page)).status_code == 200, "pages may be found under any query"
            twice = await fake.client.get("/v1/files?limit=1&limit=2")
            assert (twice.status_code, twice.json()["error"]["param"]) == (400, "limit")
            for query in ("include=message.output_text.logprobs&include=message.output_text.logprobs", "stream=false"):
                assert (await fake.client.get(f"/v1/responses/x?{query}")).status_code == 404
            for query in ("include=reasoning.encrypted_content", "stream=true"):
                assert (await fake.client.get(f"/v1/responses/x?{query}")).status_code == 400

    asyncio.run(run())


SCHEMA = {"name": "answer", "schema": {"type": "object"}, "description": "What the weather is."}
SAID = "Reply in the form answer: What the weather is."


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_the_description_of_a_form_is_told_to_the_model(path: str, system: str) -> None:
    given = [{"role": "system", "content": system}] if system else []
    spec = ModelSpec(source="fake", name="fake", system="Speak French.")
    body: dict[str, Any] = {"model": "fake"}
    if path == "/v1/responses":
        body |= {"input": [*given, USER], "text": {"format": {"type": "json_schema", **SCHEMA}}}
    else:
        body |= {"messages": [*given, USER], "response_format": {"type": "json_schema", "json_schema": SCHEMA}}

    async def run() -> None:
        async with faked(models=(spec,)) as fake:
            assert (await fake.client.post(path, json=body)).status_code == 200
            [call] = fake.model.seen
            assert isinstance(call.prompt, Chat)
            first, second = call.prompt.messages
            assert (first["role"], second["role"]) == ("system", "user")
            text = (
                first["content"] if isinstance(first["content"], str) else "".join(p["text"] for p in first["content"])
            )
            assert text == f"{system or 'Speak French.'}\n\n{SAID}"

    asyncio.run(run())


def test_there_is_nothing_that_grammars_fall_back_to() -> None:
    for fallback, status in ((True, 200), (False, 400), (None, 200)):
        held = {"regex": "[ab]", "disable_fallback": fallback}
        response, _ = posted("/v1/completions", {"model": "fake", "prompt": "x", "structured_outputs": held})
        assert response.status_code == status, response.text


def test_show_asks_which_model() -> None:
    for body in ({}, {"model": ""}, {"verbose": True}):
        response, _ = posted("/api/show", body)
        assert response.status_code == 400
        assert "model is missing" in response.text


def test_clients_of_anthropics_beta_say_so_in_the_query() -> None:
    response, _ = posted("/v1/messages?beta=true", {"model": "fake", "messages": [USER], "max_tokens": 2})
    assert response.status_code == 200, response.text
