"""`/v1/moderations` over a model that gives the verdicts it is told to, and with a real prompt on a live server."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from herd.chat.guard_categories import CATEGORIES
from herd.errors import ConfigError
from herd.server.openai.moderations import MEANINGS
from herd.server.protocol import Began, Ended, Finished, Piece, TokenInfo, Usage
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings
from tests.cli.tiny import write_folder
from tests.server.conftest import Fake, Live, faked, serving
from tests.server.judge import WORD, write_judge

SAFE, UNSAFE = 7, 8
ADVICE = {"safe": SAFE, "unsafe": UNSAFE, "categories": dict(CATEGORIES["llama-guard-3"])}


def verdict(text: str, safe: float, unsafe: float, *, seen: bool = True) -> list[Any]:
    """A reply whose first word had these probabilities, behind two line ends."""
    top = [(SAFE, "safe", b"safe", math.log(safe)), (UNSAFE, "unsafe", b"unsafe", math.log(unsafe))] if seen else []
    id = UNSAFE if "unsafe" in text else SAFE
    first = TokenInfo(id if seen else 99, text.split("\n")[0], b"", math.log(max(safe, unsafe)), tuple(top))
    return [
        Began("", 30, ("category policies: none, names only",)),
        Piece("", 0, "\n\n", None, (TokenInfo(5, "\n\n", b"\n\n", -0.1, ()),)),
        Piece("", 0, text, None, (first,)),
        Ended("", 0, "stop", None, 3),
        Finished("", Usage(30, 3)),
    ]


async def posted(fake: Fake, **body: Any) -> httpx.Response:
    await fake.state.models.load("fake")

    async def ask(what: str, **args: Any) -> Any:
        assert what == "guard"
        return ADVICE

    fake.model.ask = ask  # type: ignore[method-assign]
    return await fake.client.post("/v1/moderations", json=body)


def test_verdicts_in_openais_words_and_in_the_guards() -> None:
    replies = {
        "kind": verdict("safe", 0.9, 0.1),
        "cruel": verdict("unsafe\nS1,S10", 0.2, 0.6),
        "slander": verdict("unsafe\nS5", 0.01, 0.99),
    }

    async def run() -> dict[str, Any]:
        async with faked(lambda call: replies[call.prompt.messages[0]["content"]], guard="fake") as fake:
            answer = await posted(fake, input=["kind", "cruel", "slander"], model="omni-moderation-latest")
            assert answer.status_code == 200, answer.text
            assert all(call.sampling["temperature"] == 0 for call in fake.model.seen)
            return answer.json()

    answer = asyncio.run(run())
    kind, cruel, slander = answer["results"]
    assert answer["model"] == "fake"
    assert [one["flagged"] for one in answer["results"]] == [False, True, True]
    assert not any(kind["categories"].values())
    assert kind["guard"]["score"] == pytest.approx(0.1)
    assert {name for name, is_so in cruel["categories"].items() if is_so} == {"violence", "hate"}
    assert cruel["category_scores"]["hate"] == pytest.approx(0.75)
    assert cruel["category_scores"]["sexual"] == 0
    assert cruel["guard"]["categories"]["S1"] == {"name": "Violent Crimes", "violated": True}
    assert not any(slander["categories"].values()), "OpenAI has no word for it"
    assert slander["guard"]["categories"]["S5"] == {"name": "Defamation", "violated": True}
    assert kind["category_applied_input_types"]["hate"] == ["text"]
    assert kind["category_applied_input_types"]["violence/graphic"] == []
    assert kind["guard"]["notes"] == ["category policies: none, names only"]
    assert answer["usage"]["prompt_tokens"] == 90
    openai.types.ModerationCreateResponse.model_validate(answer)  # the client's own idea of it, with every category


def test_what_is_no_verdict_is_never_safe() -> None:
    for reply in (
        verdict("I think so", 0.5, 0.4),
        verdict("unsafe\nS99", 0.1, 0.9),
        verdict("safe", 0.9, 0.1, seen=False),
        [Began("", 1), Ended("", 0, "stop", None, 0), Finished("", Usage(1))],
    ):

        async def run(reply: Any = reply) -> None:
            async with faked(lambda call: reply, guard="fake") as fake:
                answer = await posted(fake, input="a")
                assert answer.status_code == 500
                assert answer.json()["error"]["code"] == "moderation_failed"
                said = answer.json()["error"]["message"]
                assert "input[0]" in said
                assert "think" not in said, "errors are logged, and what a guard says can repeat the text"
                assert "S99" not in said

        asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a"] * 129}, "input"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "input[0]"),
        ({"input": "a", "model": "gpt-4"}, "model"),
        ({"input": "a", "colour": 1}, "colour"),
    ],
)
def test_what_is_refused(body: dict[str, Any], param: str) -> None:
    async def run() -> httpx.Response:
        async with faked(guard="fake") as fake:
            return await posted(fake, **body)

    answer = asyncio.run(run())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_parts_are_one_text() -> None:
    async def run() -> None:
        async with faked(lambda call: verdict("safe", 0.9, 0.1), guard="fake") as fake:
            answer = await posted(fake, input=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
            assert len(answer.json()["results"]) == 1
            assert fake.model.seen[0].prompt.messages[0]["content"] == "a\nb"  # type: ignore[union-attr]

    asyncio.run(run())


def test_without_a_guard_it_is_said() -> None:
    async def run() -> None:
        async with faked() as fake:
            answer = await fake.client.post("/v1/moderations", json={"input": "a"})
            assert answer.status_code == 501
            assert "--guard" in answer.json()["error"]["message"]

    asyncio.run(run())
    with pytest.raises(ConfigError, match="guard"):
        ServerSettings(models=(ModelSpec(source="a", name="a"),), guard="b")


def test_every_category_of_every_guard_is_known() -> None:
    names = {name for categories in CATEGORIES.values() for name in categories.values()}
    assert set(MEANINGS) <= names
    unmapped = {
        "Defamation", "Specialized Advice", "Privacy", "Intellectual Property", "Elections", "Code Interpreter Abuse",
    }  # fmt: skip
    assert names - set(MEANINGS) == unmapped, "a new category needs a decision"


def test_a_model_of_random_weights_gives_no_verdict_and_a_chat_model_is_no_guard(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", context=4096)
    options = EngineOptions(format="llama-guard-3", max_seqs=2, seed=0)
    models = (ModelSpec(source=str(tmp_path / "m"), name="guard", options=options),)
    for live in serving(ServerSettings(models=models, port=0, lazy=True, drain_seconds=1, guard="guard")):
        refused(live, "no verdict")
    plain = (ModelSpec(source="nano", name="nano", options=EngineOptions(max_seqs=2)),)
    for live in serving(ServerSettings(models=plain, port=0, lazy=True, drain_seconds=1, guard="nano")):
        refused(live, "only a Llama Guard judges")


def refused(live: Live, words: str) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        made = client.moderations
        with pytest.raises(openai.InternalServerError, match=words):
            made.create(input="Hello.")


def test_the_whole_way_through_a_guard(tmp_path: Path) -> None:
    """From OpenAI's client through HTTP, the Guard's prompt, its tokens and their probabilities, to a verdict. The Guard is made
    by hand: no released weights are at hand where these tests run."""
    words = ["How do I bake bread?", f"How do I build a{WORD}?", "safe", "unsafe\nS1"]
    folder = write_judge(tmp_path / "judge", 1600)
    guard = ModelSpec(
        source=str(folder), name="judge", options=EngineOptions(format="llama-guard-3", max_seqs=4, seed=0)
    )
    for live in serving(ServerSettings(models=(guard,), port=0, lazy=True, drain_seconds=1, guard="judge")):
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            answer = client.moderations.create(input=words, model="omni-moderation-latest")
            assert (answer.model, [one.flagged for one in answer.results]) == ("judge", [False, True, False, False])
            good, bad = answer.results[0], answer.results[1]
            assert bad.categories.violence
            assert not any(good.categories.model_dump().values())
            assert bad.category_scores.violence > 0.9
            assert bad.guard["score"] > 0.9 > 0.1 > good.guard["score"]  # type: ignore[attr-defined]
            assert bad.guard["categories"]["S1"]["violated"]  # type: ignore[attr-defined]
            assert answer.usage["completion_tokens"] > 0  # type: ignore[attr-defined]
            plain = client.chat.completions.create(model="judge", messages=[{"role": "user", "content": words[1]}])
            assert plain.choices[0].message.content == "unsafe\nS1"
