"""Sampling against plain twins written from the definitions, and against its own distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.chat.params import SamplingParams
from herd.engine.sample import HEAD, penalize, probabilities, sample
from herd.errors import HerdError

PLAIN = SamplingParams(temperature=1, top_p=1)


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def twin(logits: list[float], params: SamplingParams) -> list[float]:
    """Top-k, top-p and min-p, one token at a time, from the words of their definitions."""
    probs = softmax(logits, params.temperature)
    if params.top_k:
        least = sorted(probs, reverse=True)[min(params.top_k, len(probs)) - 1]
        probs = [p if p >= least else 0.0 for p in probs]
    if params.top_p < 1:
        mass, total, kept = 0.0, sum(probs), [0.0] * len(probs)
        for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if mass > params.top_p * total:
                break
            kept[i] = probs[i]
            mass += probs[i]
        probs = kept
    if params.min_p:
        probs = [p if p >= params.min_p * max(probs) else 0.0 for p in probs]
    return [p / sum(probs) for p in probs]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-400, 400), min_size=1, max_size=40, unique=True),
    st.sampled_from([0.05, 0.6, 1.0, 5.0]),
    st.sampled_from([0, 1, 2, 7, 1000]),
    st.sampled_from([0.013, 0.37, 0.93, 1.0]),
    st.sampled_from([0.0, 0.011, 0.29, 1.0]),
)
def test_filters_equal_their_plain_twin(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    values = [x / 37 for x in logits]  # unique, so that no filter has to break a tie
    got = probabilities(torch.tensor([values], dtype=torch.float64), params)[0]
    expected = torch.tensor(twin(values, params), dtype=torch.float32)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-3)


def sorted_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Top-p by sorting the whole vocabulary: the plain version of what `probabilities` does."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = torch.nn.functional.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
    ordered = ordered.where(mass_before <= top_p * probs.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter(-1, order, ordered)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("size", [1, 7, HEAD, HEAD + 1, 5000])
def test_top_p_equals_the_full_sort_bit_for_bit(top_p: float, spread: float, size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, size, generator=generator) * spread
    logits[3:] = logits[3:].bfloat16().float()  # many ties, at the cut too
    wanted = sorted_nucleus(torch.softmax(logits - logits.amax(-1, keepdim=True), dim=-1), top_p)
    assert torch.equal(probabilities(logits, replace(PLAIN, top_p=top_p)), wanted / wanted.sum(-1, keepdim=True))


def test_rows_do_not_touch_each_other() -> None:
    logits = torch.randn(5, 30)
    params = SamplingParams(temperature=0.8, top_k=9, top_p=0.8, min_p=0.02)
    together = probabilities(logits, params)
    for row in range(5):
        torch.testing.assert_close(together[row : row + 1], probabilities(logits[row : row + 1], params))


def test_samples_follow_the_distribution() -> None:
    params = SamplingParams(temperature=0.9, top_k=12, top_p=0.95, min_p=0.01)
    logits = torch.randn(1, 20) * 1.5
    expected = probabilities(logits, params)[0]
    draws = 20_000
    generator = torch.Generator().manual_seed(3)
    ids = sample(logits.expand(draws, -1), params, generator)
    counts = torch.bincount(ids, minlength=20).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    wanted = expected[kept].double() * draws
    chi_square = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_temperature_zero_is_the_best_token_whatever_the_filters() -> None:
    logits = torch.randn(8, 50)
    greedy = SamplingParams(temperature=0, top_k=3, top_p=0.2, min_p=0.5)
    assert torch.equal(sample(logits, greedy, torch.Generator()), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-9])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    logits = torch.randn(8, 50) * 100
    params = replace(PLAIN, temperature=temperature)
    assert torch.equal(sample(logits, params, torch.Generator().manual_seed(0)), logits.argmax(-1))


def test_a_huge_temperature_is_nearly_uniform() -> None:
    probs = probabilities(torch.randn(1, 40), replace(PLAIN, temperature=1e30))
    torch.testing.assert_close(probs, torch.full((1, 40), 1 / 40))


@pytest.mark.parametrize("top_p", [1e-300, 1e-9])
def test_the_smallest_top_p_keeps_the_best_token(top_p: float) -> None:
    logits = torch.randn(4, 50)
    assert torch.equal(probabilities(logits, replace(PLAIN, top_p=top_p)).argmax(-1), logits.argmax(-1))
    assert (probabilities(logits, replace(PLAIN, top_p=top_p)) > 0).sum() == 4


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0]])
    seen = torch.tensor([True, True, True, False])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 0.0, 3.0]]
    assert logits.tolist() == [[2.0, -2.0, 0.0, 3.0]]  # the model's own logits are not changed


def test_masked_tokens_are_never_chosen() -> None:
    logits = torch.full((200, 10), float("-inf"))
    logits[:, 4] = logits[:, 7] = -1.0
    for params in (PLAIN, SamplingParams(), SamplingParams(top_k=5, min_p=0.1), SamplingParams(temperature=0)):
        ids = sample(logits, params, torch.Generator().manual_seed(1))
        assert set(ids.tolist()) <= {4, 7}


@pytest.mark.parametrize(
    "row",
    [
        [1.0, float("nan"), 2.0],
        [float("nan")] * 3,
        [1.0, float("inf"), 2.0],
        [float("-inf")] * 3,
    ],
    ids=["one nan", "all nan", "infinite", "everything filtered"],
)
@pytest.mark.parametrize("temperature", [0, 0.6])
def test_what_cannot_be_sampled_is_refused(row: list[float], temperature: float) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], row])
    with pytest.raises(HerdError, match="not finite"):
        sample(logits, SamplingParams(temperature=temperature), torch.Generator())


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(3, 100)
    for dtype in (torch.bfloat16, torch.float16):
        probs = probabilities(logits.to(dtype), SamplingParams())
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.sum(-1), torch.ones(3))
