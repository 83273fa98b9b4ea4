"""`herd.LLM` with adapters and guesses, on the model that comes with herd."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from herd.adapters.lora import LoraAdapter
from herd.chat.params import SamplingParams
from herd.checkpoint.peft import write_peft
from herd.engine.llm import LLM
from herd.errors import CheckpointError, ConfigError
from tests.build import build
from tests.engine.test_adapters import adapter

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SAMPLED = SamplingParams(temperature=0.8, seed=7, max_tokens=24)
PROMPT = "A dog. A dog. A"


def change(llm: LLM, size: float = 0.05) -> LoraAdapter:
    return adapter(llm.model, 1, only="attention", size=size)


@pytest.mark.parametrize("draft", ["lookup", "nano"])
def test_guesses_change_nothing(draft: str) -> None:
    """Greedy and sampled; a draft model keeps the tokens of a seed when that is asked for."""
    with LLM("nano", max_len=200, max_seqs=4) as llm:
        expected = [llm.generate(PROMPT, params)[0].text for params in (GREEDY, SAMPLED)]
    with LLM("nano", max_len=200, max_seqs=4, draft=draft, deterministic=draft == "nano") as llm:
        assert [llm.generate(PROMPT, params)[0].text for params in (GREEDY, SAMPLED)] == expected


def test_a_draft_model_of_another_vocabulary() -> None:
    with LLM("nano", max_len=64) as llm:
        own = llm.model, llm.tokenizer
    with pytest.raises(ConfigError, match="guesses need the same"):
        from herd.engine.draft_model import ModelDrafter

        LLM(own, max_len=64, draft=ModelDrafter(build("llama-3")))


def test_every_method_takes_an_adapter(tmp_path: Path) -> None:
    with LLM("nano", max_len=200, max_seqs=4) as llm:
        write_peft(change(llm, 0.3), tmp_path, llm.model.config, lambda _: None)
        loaded = llm.load_adapter("tuned", tmp_path)
        assert llm.adapters == (loaded,)
        base, tuned = (llm.generate(PROMPT, GREEDY, adapter=name)[0].text for name in (None, "tuned"))
        assert base != tuned
        assert [c.text for c in llm.generate([PROMPT, PROMPT], GREEDY, adapter="tuned")] == [tuned] * 2
        assert "".join(d.text or "" for d in llm.stream(PROMPT, GREEDY, adapter="tuned")) == tuned
        assert llm.submit(PROMPT, GREEDY, adapter="tuned").wait().message.text == tuned

        talk = [{"role": "user", "content": "Hello."}]
        answer = llm.chat(talk, GREEDY, adapter="tuned").message.text
        assert answer != llm.chat(talk, GREEDY).message.text

        async def later() -> tuple[str, str, str]:
            first = (await llm.agenerate(PROMPT, GREEDY, adapter="tuned"))[0].text
            second = "".join([d.text or "" async for d in llm.astream(PROMPT, GREEDY, adapter="tuned")])
            return first, second, (await llm.achat(talk, GREEDY, adapter="tuned")).message.text

        assert asyncio.run(later()) == (tuned, tuned, answer)
        llm.unload_adapter("tuned")
        assert llm.adapters == ()
        assert llm.generate(PROMPT, GREEDY)[0].text == base


def test_refusals(tmp_path: Path) -> None:
    with LLM("nano", max_len=64) as llm:
        with pytest.raises(ConfigError, match="no adapter 'x': loaded are none"):
            llm.generate(PROMPT, GREEDY, adapter="x")
        with pytest.raises(CheckpointError, match="no such adapter"):
            llm.load_adapter("x", tmp_path / "nothing")
        with pytest.raises(CheckpointError, match="changes a matrix of shape"):
            llm.load_adapter("x", adapter(build("llama-3"), 1, only="attention"))
