"""Beam search: what an exhaustive one finds, by the definition of the score, and over a real model."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine.beams import search
from herd.engine.llm import LLM
from herd.errors import ConfigError
from tests.build import build
from tests.cli.tiny import tiny_config, tokenizer

STOP = 0
VOCAB = 3


def table(seed: int) -> dict[tuple[int, ...], dict[int, float]]:
    """Log-probabilities after every prefix of up to four ids."""
    chance = random.Random(seed)
    out = {}
    for length in range(5):
        for prefix in itertools.product(range(1, VOCAB), repeat=length):
            weights = [chance.random() + 0.05 for _ in range(VOCAB)]
            out[prefix] = {i: math.log(w / sum(weights)) for i, w in enumerate(weights)}
    return out


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(8))
def test_with_room_for_everything_it_finds_the_best(seed: int, penalty: float) -> None:
    known = table(seed)

    def score(tokens: Sequence[int]) -> float:
        return sum(known[tuple(tokens[:i])][tokens[i]] for i in range(len(tokens))) / len(tokens) ** penalty

    replies = [(*p, STOP) for n in range(4) for p in itertools.product(range(1, VOCAB), repeat=n)]
    replies += list(itertools.product(range(1, VOCAB), repeat=4))
    best = sorted(replies, key=score, reverse=True)
    found = search(
        lambda prefixes: [known[p] for p in prefixes],
        beams=40,
        most=4,
        stops=frozenset({STOP}),
        penalty=penalty,
        limit="length",
    )
    assert [beam.tokens for beam in found] == best[:40]
    assert [beam.score for beam in found] == pytest.approx([score(tokens) for tokens in best[:40]])
    assert {beam.finish for beam in found if beam.tokens[-1] == STOP} == {"stop"}


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
        with pytest.raises(ConfigError, match="at most 10"):
            llm.generate("abc", SamplingParams(temperature=0, beams=11))
        with pytest.raises(ConfigError, match="prompt_logprobs"):
            llm.generate("abc", SamplingParams(temperature=0, beams=2, prompt_logprobs=1))
        (full,) = llm.generate("a" * 250, SamplingParams(temperature=0, beams=2, ignore_stop_ids=True))
        assert full.outputs[0].finish_reason == "context_full"
