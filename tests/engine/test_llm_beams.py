"""Beam search through herd.LLM (its rules: test_beam): the replies of one over whole forwards."""

from __future__ import annotations

import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine.llm import LLM
from herd.errors import ConfigError
from tests.build import build
from tests.cli.tiny import tiny_config, tokenizer


def test_over_a_model() -> None:
    model = build(tiny_config())
    with LLM((model, tokenizer()), debug=True) as llm:
        params = SamplingParams(temperature=0, beams=4, n=3, max_tokens=6, ignore_stop_ids=True)
        (found,) = llm.generate("abc", params)
        (greedy,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=6, ignore_stop_ids=True, logprobs=0))
        ids = found.prompt_tokens

        def reference(beams: int) -> list[tuple[float, list[int]]]:
            growing = [(0.0, list[int]())]
            for _ in range(6):
                with torch.inference_mode():
                    logp = model(torch.tensor([ids + t for _, t in growing]))[:, -1].log_softmax(-1)
                flat = (torch.tensor([p for p, _ in growing])[:, None] + logp).flatten().topk(beams)
                size = logp.shape[1]
                growing = [
                    (float(p), [*growing[int(i) // size][1], int(i) % size])
                    for p, i in zip(flat.values, flat.indices, strict=True)
                ]
            return growing

        expected = reference(4)[:3]
        assert [one.tokens for one in found.outputs] == [tokens for _, tokens in expected]
        assert [one.cumulative_logprob for one in found.outputs] == pytest.approx([p for p, _ in expected], abs=1e-3)
        assert (found.outputs[0].cumulative_logprob or 0) >= (greedy.outputs[0].cumulative_logprob or 0) - 1e-3
        assert {one.finish_reason for one in found.outputs} == {"length"}
        assert llm.stats().cached_tokens == 0 or llm.stats().blocks_used == 0
        with pytest.raises(ConfigError, match="prompt_logprobs"):
            llm.generate("abc", SamplingParams(temperature=0, beams=2, prompt_logprobs=1))
        (full,) = llm.generate("a" * 250, SamplingParams(temperature=0, beams=2, ignore_stop_ids=True))
        assert full.outputs[0].finish_reason == "context_full"
