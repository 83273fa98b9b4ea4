"""Beam search: transformers' on a tiny model, and all replies there are when the beams are wide enough."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from herd.chat.params import SamplingParams
from herd.engine.beam import BeamSearch, beam_search
from herd.errors import HerdError

SIZE = 97
PROMPT = [1, 5, 9, 33]
CLOSE = 2e-5
"""transformers adds scores up in float32."""


@cache
def model() -> Any:
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,  # so that some continuations are much likelier than others
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def step(hypotheses: list[tuple[int, ...]]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return model()(torch.tensor([[*PROMPT, *h] for h in hypotheses])).logits[:, -1].float().numpy()


def searched(stops: list[int], limit: int, **given: Any) -> tuple[list[list[int]], list[float]]:
    found = beam_search(step, SamplingParams(temperature=0, **given), stops, limit)
    return [list(beam.tokens) for beam in found], [beam.score or 0.0 for beam in found]


def oracle(stops: list[int], limit: int, **given: Any) -> tuple[list[list[int]], list[float]]:
    out = model().generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        do_sample=False,
        num_beams=given["beams"],
        num_return_sequences=given.get("n", 1),
        length_penalty=given.get("length_penalty", 1.0),
        min_new_tokens=given.get("min_tokens"),
        eos_token_id=stops or None,
        max_new_tokens=limit,
        early_stopping=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    replies = []
    for row in out.sequences[:, len(PROMPT) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        replies.append(row[:end])
    return replies, out.sequences_scores.tolist()


@pytest.mark.parametrize("beams", [2, 3, 8])
@pytest.mark.parametrize("stops", [[], [7], [7, 11, 40], list(range(20, 60))], ids=["none", "one", "three", "many"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
def test_beam_search_is_that_of_transformers(beams: int, stops: list[int], penalty: float) -> None:
    given: dict[str, Any] = {"beams": beams, "n": beams - 1, "length_penalty": penalty}
    replies, scores = searched(stops, 12, **given)
    expected, expected_scores = oracle(stops, 12, **given)
    assert replies == expected
    assert scores == pytest.approx(expected_scores, abs=CLOSE, rel=CLOSE)


@pytest.mark.parametrize("least", [1, 4, 9])
def test_the_minimum_length_is_that_of_transformers(least: int) -> None:
    stops = list(range(20, 60))
    assert searched(stops, 9, beams=4, n=4, min_tokens=least)[0] == oracle(stops, 9, beams=4, n=4, min_tokens=least)[0]


def test_wide_beams_find_the_likeliest_of_all_replies() -> None:
    table = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32) * 2
    logprobs = np.log(np.exp(table) / np.exp(table).sum(1, keepdims=True))

    def small(hypotheses: list[tuple[int, ...]]) -> NDArray[np.float32]:
        return table[[h[-1] if h else 0 for h in hypotheses]]

    def total(tokens: tuple[int, ...]) -> float:
        return sum(logprobs[a, b] for a, b in itertools.pairwise((0, *tokens)))

    every = sorted(itertools.product(range(6), repeat=3), key=total, reverse=True)
    params = SamplingParams(temperature=0, beams=100, n=10, length_penalty=0)
    found = beam_search(small, params, (), 3)
    assert [beam.tokens for beam in found] == every[:10]
    assert [beam.logprob for beam in found] == pytest.approx([total(t) for t in every[:10]], abs=CLOSE)
    assert {beam.finish for beam in found} == {"length"}


def test_branches_say_what_each_hypothesis_continues() -> None:
    search = BeamSearch(SamplingParams(temperature=0, beams=4, n=2), [7], 8)
    sequences: list[list[int]] = [[]]
    while not search.done:
        branches = search.advance(step([tuple(s) for s in sequences]))
        sequences = [[*sequences[b.parent], b.token] for b in branches]
        assert sequences == [list(beam.tokens) for beam in search.running]
    assert [beam.tokens for beam in search.best()] == [tuple(r) for r in searched([7], 8, beams=4, n=2)[0]]


def test_hypotheses_that_stop_are_marked_and_hold_the_stop_id() -> None:
    stops = list(range(20, 60))
    for beam in beam_search(step, SamplingParams(temperature=0, beams=4, n=4), stops, 12):
        assert beam.finish == "stop"
        assert beam.tokens[-1] in stops
        assert not set(beam.tokens[:-1]) & set(stops)


def test_damaged_logits_end_the_search() -> None:
    search = BeamSearch(SamplingParams(temperature=0, beams=2), [7], 8)
    with pytest.raises(HerdError, match="not finite"):
        search.advance(np.full((1, 9), np.nan, dtype=np.float32))


def test_a_search_with_nothing_left_says_so() -> None:
    only_stop = np.full((1, 9), -np.inf, dtype=np.float32)
    only_stop[0, 7] = 1.0
    search = BeamSearch(SamplingParams(temperature=0, beams=2, min_tokens=2), [7], 8)
    with pytest.raises(HerdError, match="nothing to go on"):
        search.advance(only_stop)
