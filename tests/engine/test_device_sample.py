"""The batched filters for GPUs do what the rows' own do; here on a CPU, and on a GPU where there is one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine import device_sample
from herd.engine.sample import weigh
from herd.engine.sampler import RowState, Sampler
from tests.engine.test_sampler import SETTINGS, SIZE, Fixed, logits_of, states

CLOSE = {"atol": 2e-6, "rtol": 2e-4}
"""torch's exp and numpy's differ in the last bits."""


def variety() -> list[SamplingParams]:
    values = itertools.product([0.5, 1.0], [0, 3, 300, 10**9], [1.0, 0.6], [1.0, 0.9, 1e-9], [0.0, 0.1])
    return [SamplingParams(temperature=t, top_k=k, typical_p=y, top_p=p, min_p=m) for t, k, y, p, m in values]


@pytest.mark.parametrize("ties", [False, True])
def test_weights_of_a_batch_are_those_of_each_row(ties: bool) -> None:
    params = variety()
    logits = logits_of(len(params), 700)
    if ties:
        logits = (logits * 4).round() / 4
    together = device_sample.weigh(logits, params)
    for row, values, own in zip(together, logits, params, strict=True):
        expected = weigh(values.numpy(), own).dense(700)
        np.testing.assert_allclose((row / row.sum()).numpy(), expected, **CLOSE)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tokens_and_logprobs_are_those_of_the_rows_one_by_one(device: str) -> None:
    rows = states(4 * len(SETTINGS))
    rows[1].mask = rows[14].mask = Fixed(frozenset(range(50, 60)), SIZE)
    twins = [row.fork() for row in rows]
    sampler = Sampler()
    for seed in range(12):
        logits = logits_of(len(rows), seed=seed)
        expected = sampler.sample(logits, twins)
        found = sampler.on_device(logits.to(device), rows)
        for one, other in zip(found, expected, strict=True):
            assert (one.token, one.error) == (other.token, other.error)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert (one.top is None) == (other.top is None)
            if one.top is not None and other.top is not None:
                assert list(one.top) == list(other.top)
                assert list(one.top.values()) == pytest.approx(list(other.top.values()), abs=1e-5)
        for row, twin, sampled in zip(rows, twins, found, strict=True):
            assert sampled.token is not None
            row.append(sampled.token)
            twin.append(sampled.token)


def test_damaged_rows_are_errors_and_their_neighbours_are_not() -> None:
    rows = [
        *states(4),
        RowState(SamplingParams(min_tokens=1), vocab_size=SIZE, stop_ids={1}, mask=Fixed(frozenset({1}), SIZE)),
    ]
    logits = logits_of(5)
    expected = Sampler().sample(logits, rows)
    logits[1, 5], logits[2, 9] = float("nan"), float("inf")
    found = Sampler().on_device(logits, rows)
    assert (found[0], found[3]) == (expected[0], expected[3])
    assert "not finite" in str(found[1].error)
    assert "not finite" in str(found[2].error)
    assert "no token is left" in str(found[4].error)


def test_the_first_of_equal_tokens_is_taken_and_logits_stay_as_they_are() -> None:
    logits = torch.zeros(2, 40)
    logits[1, 7:] = 3.0
    before = logits.clone()
    rows = [RowState(SamplingParams(temperature=0, repetition_penalty=1.5), [9], vocab_size=40) for _ in range(2)]
    assert [one.token for one in Sampler().on_device(logits, rows)] == [0, 7]
    assert torch.equal(logits, before)
