"""`herd.LLM` of a model that `herd create` made: everything that was said of it, as when it is run, served or talked to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from herd.chat.params import SamplingParams
from herd.checkpoint.load import open_checkpoint
from herd.checkpoint.peft import write_peft
from herd.engine.llm import LLM
from herd.errors import ConfigError
from herd.hub.created import Created, save
from tests.engine.test_llm_adapters import change

SYSTEM = "You only talk about sheep."
TURNS = (("user", "What do you like?"), ("assistant", "Sheep."))
ASKED = [{"role": "user", "content": "Tell me a story."}]
PROMPT = "A dog. A dog. A"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HERD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lora")
    with LLM("nano", max_len=64) as llm:
        write_peft(change(llm, 0.3), folder, llm.model.config, lambda _: None)
    return str(folder)


def made(**more: Any) -> str:
    save(Created("sheep:latest", "nano", params=GREEDY, **more))
    return "sheep"


@pytest.fixture(scope="module")
def plainly(lora: str) -> tuple[Any, ...]:
    """What nano says when everything is given to it by hand."""
    before = [{"role": "system", "content": SYSTEM}, *({"role": role, "content": text} for role, text in TURNS)]
    params = SamplingParams(**GREEDY)
    with LLM("nano") as plain:
        plain.load_adapter("tuned", lora)
        return (
            plain.chat([*before, *ASKED], params, adapter="tuned").message.text,
            plain.generate(PROMPT, params, adapter="tuned")[0].text,
            plain.chat(ASKED, params).message.text,
            plain.score([("A dog", " runs")], adapter="tuned"),
            plain.embed(["A dog"], adapter="tuned"),
        )


@pytest.mark.parametrize("opened", [False, True], ids=["by name", "opened before"])
def test_system_prompt_turns_parameters_context_and_adapter(opened: bool, lora: str, plainly: tuple[Any, ...]) -> None:
    name = made(system=SYSTEM, messages=TURNS, context=300, adapter=lora)
    expected, text, bare, sure, vector = plainly
    with LLM(open_checkpoint(name, "float32") if opened else name) as llm:
        assert llm.chat(ASKED).message.text == expected
        assert llm.generate(PROMPT)[0].text == text
        assert "".join(delta.text or "" for delta in llm.stream(ASKED)) == expected
        assert llm.submit(ASKED).wait().message.text == expected
        assert [reply.message.text for reply in llm.chat([ASKED, ASKED])] == [expected] * 2
        assert asyncio.run(llm.achat(ASKED)).message.text == expected
        assert llm.score([("A dog", " runs")]) == sure
        assert (llm.embed(["A dog"]) - vector).abs().max() == 0
        assert llm.max_len == 300
        assert [one.name for one in llm.adapters] == ["sheep:latest"]
    assert expected != bare


def test_what_is_given_comes_first(lora: str) -> None:
    name = made(system=SYSTEM, context=300, adapter=lora)
    own = [{"role": "system", "content": "You are a cat."}, *ASKED]
    params = SamplingParams(**GREEDY)
    with LLM("nano") as plain:
        plain.load_adapter("tuned", lora)
        expected = plain.chat(own, params, adapter="tuned").message.text
        longer = plain.chat(
            [{"role": "system", "content": SYSTEM}, *ASKED], SamplingParams(temperature=0, max_tokens=20)
        )
    with LLM(name, max_len=200) as llm:
        assert llm.chat(own).message.text == expected, "a system prompt of the conversation stands for the model's"
        assert llm.max_len == 200
        llm.unload_adapter("sheep:latest")
        assert llm.chat(ASKED, SamplingParams(temperature=0, max_tokens=20)).message == longer.message
    with LLM(name, created=False) as llm:  # what a server asks for, which adds the rest itself
        assert llm.adapters == ()
        assert llm.params().max_tokens == 12


def test_a_prompt_that_is_kept_begins_as_conversations_do(tmp_path: Path) -> None:
    name = made(system=SYSTEM * 8)
    with LLM(name) as llm:
        kept = llm.save_prompt(tmp_path / "prompt", [{"role": "user", "content": "Hello."}])
        with LLM("nano") as plain:
            whole = [{"role": "system", "content": SYSTEM * 8}, {"role": "user", "content": "Hello."}]
            assert kept == plain.save_prompt(tmp_path / "other", whole)


def test_format_and_refusals(lora: str) -> None:
    name = made(format="base")
    with LLM(name) as llm:
        assert llm.format.name == "base"
    with LLM(name, format="llama3") as llm:
        assert llm.format.name == "llama3"
    save(Created("two:latest", "nano", adapter=lora))
    with pytest.raises(ConfigError, match=r"two:latest has an adapter.*tensor_parallel=2"):
        LLM("two", tensor_parallel=2)
    save(Created("gone:latest", "nano", adapter=lora + "-gone"))
    with pytest.raises(Exception, match="no such adapter"):
        LLM("gone")
