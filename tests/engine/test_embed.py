"""Embeddings against transformers' hidden states; packed, in pieces, alone and through herd.LLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from herd.checkpoint.peft import write_peft
from herd.engine import embed as module
from herd.engine.embed import embed, shortened
from herd.engine.llm import LLM
from herd.errors import ConfigError, ContextFullError, HerdError, PromptError
from herd.model.llama import Llama
from tests.build import build, tokens
from tests.engine.test_adapters import adapter
from tests.parity.test_transformers import oracle

BOUND = 2e-5
"""Largest difference of pooled float32 states of order one: two implementations sum in different orders."""


def prompts(model: Llama, *lengths: int) -> list[list[int]]:
    return [tokens(model.config, length, seed=length).flatten().tolist() for length in lengths]


def theirs(model: Llama, ids: list[int], pooling: str) -> Tensor:
    with torch.inference_mode():
        states = oracle(model).model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].float()
    return states.mean(0) if pooling == "mean" else states[-1]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("name", ["llama-2", "llama-3.1", "llama-4-scout"])
def test_pooled_states_are_those_of_transformers(
    name: str, pooling: module.Pooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    every = prompts(model, 3, 17, 1, 50)
    expected = torch.stack([theirs(model, ids, pooling) for ids in every])
    for rows in (512, 20, 16):  # all packed; some packed and one in pieces; most in pieces
        monkeypatch.setattr(module, "ROWS", rows)
        for alone in (False, True):
            found = embed(every, lambda task: task(model), pooling=pooling, alone=alone)
            assert (found - expected).abs().max() < BOUND, (rows, alone)


def test_alone_means_the_same_bits_in_any_company() -> None:
    model = build("llama-3")
    every = prompts(model, 5, 9, 30)
    together = embed(every, lambda task: task(model), alone=True)
    for row, ids in zip(together, every, strict=True):
        assert torch.equal(row, embed([ids], lambda task: task(model), alone=True)[0])


def test_shortened() -> None:
    vectors = torch.tensor([[3.0, 4.0, 12.0]])
    assert torch.allclose(shortened(vectors, None), vectors / 13)
    assert torch.allclose(shortened(vectors, 2), torch.tensor([[0.6, 0.8]]))
    assert torch.equal(shortened(vectors, 2, normalize=False), vectors[:, :2])
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match="vectors have 3"):
            shortened(vectors, wrong)


def test_what_cannot_be_embedded() -> None:
    model = build("llama-3")
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        embed([[1], []], lambda task: task(model))
    for wrong in (-1, model.config.vocab_size):
        with pytest.raises(PromptError, match="prompt 0 holds an id"):
            embed([[1, wrong]], lambda task: task(model))
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(HerdError, match="not finite"):
        embed([[1, 2]], lambda task: task(model))


def test_herd_llm_embeds_beside_replies(tmp_path: Path) -> None:
    with LLM("nano", max_len=200, max_seqs=4) as llm:
        running = llm.submit("A dog. A", llm.params(max_tokens=60, temperature=0, ignore_stop_ids=True))
        texts = ["A dog ran.", "The dog ran away.", "Numbers: 1, 2, 3!"]
        found = llm.embed(texts)
        assert found.shape == (3, llm.model.config.dim)
        assert torch.allclose(found.norm(dim=-1), torch.ones(3))
        ids = [llm._intake.base.complete(text).tokens for text in texts]
        expected = torch.stack([theirs(llm.model.float(), list(one), "mean") for one in ids])
        # The weights are bfloat16 or float32 as they come; the oracle computes in their dtype.
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999
        assert torch.allclose(llm.embed([ids[0]])[0], found[0], atol=1e-5), "ids are taken as they are"
        assert running.wait().usage.completion_tokens == 60

        write_peft(adapter(llm.model, 1, only="attention", size=0.3), tmp_path, llm.model.config, lambda _: None)
        llm.load_adapter("tuned", tmp_path)
        assert not torch.allclose(llm.embed(texts, adapter="tuned"), found, atol=1e-3)
        assert torch.allclose(llm.embed(texts), found, atol=1e-5)
        with pytest.raises(ConfigError, match="no adapter"):
            llm.embed(texts, adapter="other")
        with pytest.raises(ContextFullError, match="prompt 1 has"):
            llm.embed(["a", "word " * 400])
        with pytest.raises(ConfigError, match="dimensions"):
            llm.embed(["a"], dimensions=10**6)
        with pytest.raises(ConfigError, match="pooling"):
            llm.embed(["a"], pooling="cls")  # type: ignore[arg-type]
