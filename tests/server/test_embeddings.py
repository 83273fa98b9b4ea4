"""`/v1/embeddings`, `/tokenize` and `/detokenize` on a live server, and what they refuse."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Live, faked

TEXTS = ["A dog ran.", "The dog ran away.", "Numbers: 1, 2, 3!"]
BOUND = 1e-5
"""Numbers of vectors of length 1: the same text in other company is computed in other orders of summation."""


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def near(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) < BOUND


def test_base64_and_floats_are_the_same_numbers(client: openai.OpenAI, http: httpx.Client) -> None:
    packed = client.embeddings.create(model="nano", input=TEXTS)  # the client asks for base64 itself
    plain = client.embeddings.create(model="nano", input=TEXTS, encoding_format="float")
    for i, (a, b) in enumerate(zip(packed.data, plain.data, strict=True)):
        assert a.index == b.index == i
        assert near(a.embedding, b.embedding)
        assert sum(x * x for x in a.embedding) == pytest.approx(1, abs=1e-5)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 12
    raw = http.post("/v1/embeddings", json={"model": "nano", "input": "A dog ran.", "encoding_format": "base64"}).json()
    data = base64.b64decode(raw["data"][0]["embedding"])
    assert near(list(struct.unpack(f"<{len(data) // 4}f", data)), plain.data[0].embedding)


def test_ids_and_texts_are_the_same(client: openai.OpenAI, http: httpx.Client) -> None:
    found = http.post("/tokenize", json={"model": "nano", "prompt": TEXTS[0]}).json()
    ids = found["tokens"]
    assert found["count"] == len(ids)
    text = client.embeddings.create(model="nano", input=TEXTS[0])
    one = client.embeddings.create(model="nano", input=ids)
    several = client.embeddings.create(model="nano", input=[ids, ids[:2]])
    assert text.usage.prompt_tokens == one.usage.prompt_tokens == len(ids)
    assert near(text.data[0].embedding, one.data[0].embedding)
    assert near(text.data[0].embedding, several.data[0].embedding)
    assert not near(several.data[0].embedding, several.data[1].embedding)


def test_dimensions_are_the_first_ones_of_length_one(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model="nano", input=TEXTS[0]).data[0].embedding
    short = client.embeddings.create(model="nano", input=TEXTS[0], dimensions=8).data[0].embedding
    size = sum(x * x for x in whole[:8]) ** 0.5
    assert near(short, [x / size for x in whole[:8]])
    plain = client.embeddings.create(
        model="nano", input=TEXTS[0], dimensions=8, extra_body={"normalize": False}
    ).data[0].embedding  # fmt: skip
    assert sum(x * x for x in plain) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": ""}, "input", ""),
        ({"input": []}, "input", ""),
        ({"input": ["a", ""]}, "input[1]", ""),
        ({"input": [[1], []]}, "input[1]", ""),
        ({"input": [-1]}, "input[0]", ""),
        ({"input": ["a", 3]}, "input", ""),
        ({"input": [[1], [10**9]]}, "input[1]", "an id that the model does not have"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": ["a", "word " * 3000]}, "input[1]", "tokens, and the context holds"),
        ({"input": "a", "dimensions": 0}, "dimensions", ""),
        ({"input": "a", "dimensions": 4097}, "dimensions", "vectors have"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", ""),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "never cut"),
        ({"input": "a", "task": "query"}, "task", "unknown field"),
        ({}, "input", "missing"),
    ],
)
def test_what_is_refused(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    answer = http.post("/v1/embeddings", json={"model": "nano", **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert words in error["message"]
    if "context" in words:
        assert error["code"] == "context_length_exceeded"


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.embeddings.create(model="other", input="a")


def test_inputs_are_asked_for_in_parts_and_the_adapter_is_told() -> None:
    asked: list[dict[str, Any]] = []

    async def ask(what: str, **args: Any) -> Any:
        asked.append(args)
        return {"vectors": ["AACAPw=="] * len(args["prompts"]), "tokens": [1] * len(args["prompts"])}

    async def run() -> None:
        async with faked(pooling="last") as fake:
            await fake.state.models.load("fake")
            fake.model.ask = ask  # type: ignore[method-assign]
            answer = await fake.client.post(
                "/v1/embeddings", json={"model": "fake@a", "input": ["x" * 9000, "y" * 9000, "z"]}
            )
            assert answer.json()["data"][2] == {"object": "embedding", "index": 2, "embedding": [1.0]}

    asyncio.run(run())
    assert [len(args["prompts"]) for args in asked] == [1, 2]
    assert all(args["adapter"] == "a" and args["pooling"] == "last" for args in asked)


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    text = "Hé, 你好!"
    found = http.post("/tokenize", json={"model": "json", "prompt": text, "return_token_strs": True}).json()
    assert found["max_model_len"] == 4096
    assert found["token_strs"][0] == "<|begin_of_text|>"
    assert len(found["token_strs"]) == found["count"] == len(text.encode()) + 1
    plain = http.post("/tokenize", json={"model": "json", "prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == found["tokens"][1:] == list(text.encode())
    assert plain["token_strs"] is None
    back = http.post("/detokenize", json={"model": "json", "tokens": found["tokens"]}).json()
    assert back == {"prompt": f"<|begin_of_text|>{text}"}


def test_a_conversation_has_the_tokens_of_its_prompt(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    counted = http.post("/tokenize", json={"model": "nano", "messages": messages}).json()["count"]
    answer = http.post("/v1/chat/completions", json={"model": "nano", "messages": messages, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == counted
    open_ = http.post(
        "/tokenize", json={"model": "nano", "messages": messages, "add_generation_prompt": False}
    ).json()  # fmt: skip
    assert open_["count"] < counted


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {"prompt": "a"}, "model"),  # there are three
        ("tokenize", {"model": "nano"}, None),
        ("tokenize", {"model": "nano", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}, None),
        ("tokenize", {"model": "nano", "content": "a"}, "content"),
        ("tokenize", {"model": "nano", "prompt": 3}, "prompt"),
        ("detokenize", {"model": "nano", "tokens": [10**8]}, None),
        ("detokenize", {"model": "nano", "tokens": [-1]}, "tokens[0]"),
        ("detokenize", {"model": "nano", "tokens": "a"}, "tokens"),
    ],
)
def test_what_tokenize_refuses(http: httpx.Client, path: str, body: dict[str, Any], param: str | None) -> None:
    answer = http.post(f"/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    if body.get("tokens") == [10**8]:
        assert error["message"].startswith("100,000,000 is no id of this model")
