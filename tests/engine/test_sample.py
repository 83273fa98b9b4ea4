"""Filters and draws against plain twins written from the definitions, against transformers, and their own distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from herd.chat.params import SamplingParams
from herd.engine.sample import FEW, Weights, best_of_row, draw, weigh
from herd.engine.sampler import uniform
from tests.engine.reference_sample import filtered, reference_sample

PLAIN = SamplingParams(temperature=1, top_p=1)
CLOSE = {"atol": 2e-5, "rtol": 2e-3}
"""Weights are float32; the twins compute in float64."""


def logits_of(size: int, spread: float = 3.0, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def probabilities(row: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    return weigh(row, params).dense(len(row))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-400, 400), min_size=1, max_size=40, unique=True),
    st.sampled_from([0.05, 0.6, 1.0, 5.0]),
    st.sampled_from([0, 1, 2, 7, 1000]),
    st.sampled_from([0.023, 0.41, 0.97, 1.0]),
    st.sampled_from([0.013, 0.37, 0.93, 1.0]),
    st.sampled_from([0.0, 0.011, 0.29, 1.0]),
    st.floats(0, 1, exclude_max=True),
)
def test_filters_and_draw_equal_their_plain_twin(
    logits: list[int], temperature: float, top_k: int, typical_p: float, top_p: float, min_p: float, number: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, typical_p=typical_p, top_p=top_p, min_p=min_p)
    values = [float(np.float32(x / 37)) for x in logits]  # unique, so that no filter has to break a tie
    expected = filtered(values, params)
    kept = weigh(np.array(values, dtype=np.float32), params)
    np.testing.assert_allclose(kept.dense(len(values)), expected, **CLOSE)
    token = draw(kept, number)
    if token != reference_sample(values, params, number):  # only when the number falls on a border, within rounding
        borders = np.cumsum(expected)
        assert np.abs(borders - number).min() < CLOSE["atol"]


def sorted_nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.bool_]:
    """Top-p by sorting the whole vocabulary: who stays."""
    order = np.argsort(-weights, kind="stable")
    before = np.concatenate([[0.0], weights[order].cumsum(dtype=np.float64)[:-1]])
    stays = np.zeros(len(weights), dtype=bool)
    stays[order[before <= top_p * weights.sum(dtype=np.float64)]] = True
    return stays


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("size", [1, 7, FEW, FEW + 1, 5000])
def test_top_p_equals_the_full_sort(top_p: float, spread: float, size: int) -> None:
    for seed in range(6):
        row = logits_of(size, spread, seed)
        if seed >= 3:
            row = torch.from_numpy(row).bfloat16().float().numpy()  # many ties, at the border too
        stays = sorted_nucleus(np.exp(row - row.max()), top_p)
        got = weigh(row, replace(PLAIN, top_p=top_p))
        assert got.ids is None
        # What has no weight in float32 may stay or not: it is never drawn.
        assert np.array_equal((got.values > 0), stays & (np.exp(row - row.max()) > 0))


@pytest.mark.parametrize("k", [1, 2, 63, 64, 500, 2500, 4999, 5000, 10**18])
def test_top_k_equals_the_full_sort_and_keeps_ties(k: int) -> None:
    for seed in range(3):
        row = logits_of(5000, seed=seed)
        if seed == 2:
            row = torch.from_numpy(row).bfloat16().float().numpy()
        least = np.sort(row)[::-1][min(k, 5000) - 1]
        assert np.array_equal(probabilities(row, replace(PLAIN, top_k=k)) > 0, row >= least)


@pytest.mark.parametrize("size", [3, 700, 20_000])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_best_are_those_of_a_stable_sort(size: int, count: int) -> None:
    for row in (logits_of(size), np.zeros(size, dtype=np.float32), logits_of(size).round()):
        assert best_of_row(row, count).tolist() == np.argsort(-row, kind="stable")[:count].tolist()


@pytest.mark.parametrize("value", [0.05, 0.4, 0.9, 0.99])
@pytest.mark.parametrize("name", ["top_p", "min_p", "typical_p"])
@pytest.mark.parametrize("size", [50, 3000])
def test_filters_are_those_of_transformers(name: str, value: float, size: int) -> None:
    import transformers

    warper = {
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
        "typical_p": transformers.TypicalLogitsWarper,
    }[name](value)
    for seed in range(5):
        row = logits_of(size, 2.0, seed)
        oracle = warper(None, torch.from_numpy(row.copy())[None]).softmax(-1)[0].numpy()
        np.testing.assert_allclose(probabilities(row, replace(PLAIN, **{name: value})), oracle, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("top_k", [1, 7, 60])
def test_temperature_and_top_k_are_those_of_transformers(temperature: float, top_k: int) -> None:
    import transformers

    row = logits_of(1000)
    scores = transformers.TemperatureLogitsWarper(temperature)(None, torch.from_numpy(row.copy())[None])  # type: ignore[arg-type]
    scores = transformers.TopKLogitsWarper(top_k)(None, scores)  # type: ignore[arg-type]
    got = probabilities(row, replace(PLAIN, temperature=temperature, top_k=top_k))
    np.testing.assert_allclose(got, scores.softmax(-1)[0].numpy(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        SamplingParams(temperature=0.9, top_k=12, top_p=0.95, min_p=0.01),
        SamplingParams(temperature=1.2, top_p=1, typical_p=0.8),
    ],
)
def test_samples_follow_the_distribution(params: SamplingParams) -> None:
    row = logits_of(200, 1.5)
    expected = probabilities(row, params)
    kept, draws = weigh(row, params).copy(), 20_000
    counts = np.bincount([draw(kept, uniform(3, 0, i)) for i in range(draws)], minlength=len(row))
    assert counts[expected == 0].sum() == 0
    wanted = expected * draws
    common = wanted >= 5  # the chi-square approximation wants no smaller cells: the rest is one cell
    cells = np.append(counts[common], counts[~common].sum()), np.append(wanted[common], wanted[~common].sum())
    there = cells[1] > 0
    chi_square = float(((cells[0] - cells[1])[there] ** 2 / cells[1][there]).sum())
    freedom = int(there.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_every_number_draws_something_that_has_weight() -> None:
    values = np.zeros(300, dtype=np.float32)
    values[[5, 64, 130, 299]] = [1e-30, 1, 1e-20, 0.25]
    numbers = [0.0, 5e-324, 0.3, 0.8, 0.8000000001, 1 - 2**-53]
    for weights in (Weights(None, values), Weights(np.flatnonzero(values), values[values > 0])):
        assert {draw(weights, number) for number in numbers} <= {5, 64, 130, 299}
        assert draw(weights, 0.0) == 5
        assert draw(weights, 0.79) == 64
        assert draw(weights, 1 - 2**-53) == 299
    assert draw(Weights(None, values[:100]), 1 - 2**-53) == 64  # nothing after it has any


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-9])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    for seed in range(8):
        row = logits_of(50, 100, seed)
        row[3] = -1e30
        assert draw(weigh(row, replace(PLAIN, temperature=temperature)), 0.999) == row.argmax()


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_a_huge_temperature_is_nearly_uniform(temperature: float) -> None:
    np.testing.assert_allclose(probabilities(logits_of(40), replace(PLAIN, temperature=temperature)), 1 / 40, rtol=1e-6)


@pytest.mark.parametrize("top_p", [1e-300, 1e-9])
@pytest.mark.parametrize("size", [50, 5000])
def test_the_smallest_top_p_keeps_the_best_token(top_p: float, size: int) -> None:
    row = logits_of(size)
    assert np.flatnonzero(probabilities(row, replace(PLAIN, top_p=top_p))).tolist() == [row.argmax()]


def test_masked_tokens_are_never_chosen() -> None:
    row = np.full(10, -np.inf, dtype=np.float32)
    row[[4, 7]] = -1.0
    every = (PLAIN, SamplingParams(), SamplingParams(top_k=5, min_p=0.1), replace(PLAIN, typical_p=0.9))
    for params in every:
        kept = weigh(row, params).copy()
        assert {draw(kept, uniform(1, 0, i)) for i in range(50)} == {4, 7}


def test_weights_that_were_copied_outlive_the_next_row() -> None:
    first, second = logits_of(5000, seed=1), logits_of(5000, seed=2)
    kept = weigh(first, SamplingParams()).copy()
    before = kept.dense(5000)
    weigh(second, SamplingParams())
    assert np.array_equal(kept.dense(5000), before)
