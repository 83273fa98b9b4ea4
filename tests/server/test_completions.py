"""`/v1/completions` on a live server, and over a model that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from herd.server.process import WorkerError
from herd.server.protocol import Ids, Text
from tests.server.conftest import Live, faked
from tests.server.fakes import saying


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_texts_and_ids_are_the_same_prompt(client: openai.OpenAI, http: httpx.Client) -> None:
    from herd.checkpoint.vocabulary import load_tokenizer

    ids = load_tokenizer("nano").encode("Once upon a time", bos=True)
    made = client.completions.create(model="nano", prompt=["Once upon a time", "The cat"], max_tokens=8, temperature=0)
    first, second = [choice.text for choice in made.choices]
    assert first != second
    assert [choice.index for choice in made.choices] == [0, 1]
    assert client.completions.create(model="nano", prompt=ids, max_tokens=8, temperature=0).choices[0].text == first
    both = client.completions.create(model="nano", prompt=[ids, ids], max_tokens=8, temperature=0)
    assert [choice.text for choice in both.choices] == [first, first]
    assert made.usage is not None
    assert made.usage.completion_tokens == 16


def test_the_default_is_16_tokens(client: openai.OpenAI) -> None:
    made = client.completions.create(model="nano", prompt="Once upon a time", extra_body={"ignore_eos": True})
    assert made.usage is not None
    assert made.usage.completion_tokens == 16


def test_echo_and_logprobs_tell_the_prompt(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="nano", prompt="Once upon", echo=True, logprobs=2, max_tokens=4, temperature=0
    )
    choice = made.choices[0]
    told = choice.logprobs
    assert choice.text.startswith("Once upon")
    assert told is not None
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert told.text_offset is not None
    assert told.token_logprobs[0] is None
    assert "".join(told.tokens[1:]) == choice.text, "behind the token that begins a text"
    for token, offset in zip(told.tokens[1:], told.text_offset[1:], strict=True):
        assert choice.text[offset:].startswith(token)
    streamed = client.completions.create(
        model="nano", prompt="Once upon", echo=True, logprobs=2, max_tokens=4, temperature=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in streamed]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [t for chunk in chunks if chunk.logprobs for t in chunk.logprobs.tokens or ()] == told.tokens
    assert [o for chunk in chunks if chunk.logprobs for o in chunk.logprobs.text_offset or ()] == told.text_offset


def test_nothing_but_the_prompt(client: openai.OpenAI) -> None:
    """How lm-evaluation-harness scores: max_tokens 0, echo, logprobs."""
    whole = client.completions.create(
        model="nano", prompt="Once upon a time", echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    scored = client.completions.create(model="nano", prompt="Once upon a time", echo=True, logprobs=1, max_tokens=0)
    assert scored.choices[0].text == "Once upon a time"
    a, b = whole.choices[0].logprobs, scored.choices[0].logprobs
    assert a is not None
    assert b is not None
    assert b.token_logprobs is not None
    assert a.token_logprobs is not None
    assert b.token_logprobs == a.token_logprobs[: len(b.token_logprobs)]
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0


def test_best_of_is_among_n(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        made = client.completions.create(
            model="nano", prompt="Once upon a time", seed=4, max_tokens=10, temperature=1.0, **more
        )
        return [choice.text for choice in made.choices]

    best = texts(best_of=4, n=2)
    assert len(best) == 2
    assert set(best) <= set(texts(n=4))


def test_streams_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["Once upon a time", "The cat", "A dog"]
    whole = client.completions.create(model="nano", prompt=prompts, n=2, seed=1, max_tokens=6, temperature=1)
    stream = client.completions.create(
        model="nano",
        prompt=prompts,
        n=2,
        seed=1,
        max_tokens=6,
        temperature=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = [""] * 6
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == 36


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": "x", "suffix": "y"}, None),
    ({"prompt": "x", "best_of": 3, "stream": True}, "best_of"),
    ({"prompt": "x", "best_of": 1, "n": 2}, "best_of"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [10**7]}, None),
    ({"prompt": ["a"] * 200}, "prompt"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_completion_tokens": 3}, "max_completion_tokens"),
    ({"prompt": ["x" * 3_000_000, "y"], "n": 8}, "prompt"),
    ({"prompt": ["x", "y " * 900]}, None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD, ids=range(len(BAD)))
def test_refusals_name_the_field(http: httpx.Client, body: dict[str, Any], param: str | None) -> None:
    response = http.post("/v1/completions", json={"model": "nano", **body})
    assert response.status_code == 400, response.text
    if param is not None:
        assert response.json()["error"]["param"] == param, response.text


def test_suffix_says_which_models_have_it(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": "nano", "prompt": "x", "suffix": "y"})
    assert "Code Llama" in response.json()["error"]["message"]


def test_prompts_become_calls() -> None:
    async def run() -> None:
        async with faked(lambda call: saying("x")) as fake:
            for prompt, made in (
                ("a", [Text("a")]),
                (["a", "b"], [Text("a"), Text("b")]),
                ([1, 2], [Ids((1, 2))]),
                ([[1], [2, 3]], [Ids((1,)), Ids((2, 3))]),
            ):
                response = await fake.client.post("/v1/completions", json={"model": "fake", "prompt": prompt})
                assert response.status_code == 200
                assert [call.prompt for call in fake.model.seen[-len(made) :]] == made
            await fake.client.post("/v1/completions", json={"model": "fake", "prompt": "a", "suffix": "b"})
            assert fake.model.seen[-1].prompt == Text("a", "b")

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_one_bad_prompt_ends_all(stream: bool) -> None:
    async def run() -> None:
        def script(call: Any) -> Any:
            return [WorkerError("no", kind="PromptError")] if call.prompt == Text("bad") else [*saying("x")[:1], 5.0]

        async with faked(script) as fake:
            body = {"model": "fake", "prompt": ["good", "bad", "good"], "stream": stream}
            response = await fake.client.post("/v1/completions", json=body)
            assert response.status_code == 400
            assert fake.model.running == 0
            assert not fake.state.running

    asyncio.run(run())
