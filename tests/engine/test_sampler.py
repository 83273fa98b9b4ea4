"""The sampler as engines use it: rows that do not know each other, seeds, penalties, errors of one row, log-probabilities."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from herd.chat.params import SamplingParams
from herd.engine.logits import Uses, keep_allowed
from herd.engine.sampler import RowState, Sampled, Sampler, uniform
from herd.errors import ConfigError
from tests.engine.reference_sample import adjusted

SIZE = 3000
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 1, "top_p": 1},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1, "top_p": 1, "min_p": 0.05},
    {"temperature": 1, "top_p": 1, "typical_p": 0.7},
    {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.3},
    {"temperature": 0.9, "logit_bias": {3: 5.0, 70: -100}, "min_tokens": 5, "logprobs": 4},
]


def logits_of(rows: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def states(count: int, **extra: Any) -> list[RowState]:
    return [
        RowState(
            SamplingParams(seed=100 + i, **SETTINGS[i % len(SETTINGS)]),
            range(i, i + 9),
            vocab_size=SIZE,
            stop_ids={7, 8},
            **extra,
        )
        for i in range(count)
    ]


def run(logits: list[torch.Tensor], rows: list[RowState], which: list[int]) -> list[list[Sampled]]:
    """What the rows `which` are given over several steps, as one batch."""
    sampler, found = Sampler(), []
    for step in logits:
        found.append(sampler.sample(step[which], rows))
        for row, sampled in zip(rows, found[-1], strict=True):
            assert sampled.token is not None
            row.append(sampled.token)
    return found


def test_a_row_alone_is_the_row_in_any_batch_bit_for_bit() -> None:
    logits = [logits_of(16, seed=s) for s in range(6)]
    together = run(logits, states(16), list(range(16)))
    for i in range(16):
        alone = run(logits, [states(16)[i]], [i])
        assert [step[0] for step in alone] == [step[i] for step in together]
    backwards = run(logits, states(16)[::-1], list(range(15, -1, -1)))
    assert [step[::-1] for step in backwards] == together


def test_a_batch_of_random_states_does_not_depend_on_threads() -> None:
    logits = [logits_of(16, seed=s) for s in range(3)]
    expected = run(logits, states(16), list(range(16)))
    found: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda t=t: found.__setitem__(t, run(logits, states(16), list(range(16)))))
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 4


def test_a_state_built_again_from_its_tokens_goes_on_in_the_same_way() -> None:
    logits = [logits_of(8, seed=s) for s in range(8)]
    whole = run(logits, states(8), list(range(8)))
    first = run(logits[:3], states(8), list(range(8)))
    for i in range(8):
        old = states(8)[i]
        generated = [step[i].token for step in first]
        row = RowState(old.params, range(i, i + 9), vocab_size=SIZE, stop_ids={7, 8}, generated=generated)  # type: ignore[arg-type]
        assert row.position == 3
        assert [s[0] for s in run(logits[3:], [row], [i])] == [s[i] for s in whole[3:]]


def test_a_fork_is_independent_and_draws_its_own_numbers() -> None:
    row = RowState(SamplingParams(seed=5, repetition_penalty=1.5), [1, 2], vocab_size=SIZE)
    row.append(9)
    twin, other = row.fork(), row.fork(index=1)
    assert (twin.uniform(), twin.position) == (row.uniform(), 1)
    assert other.uniform() != row.uniform()
    row.append(10)
    assert twin.position == 1
    logits = logits_of(1)[0].numpy()
    assert not np.array_equal(twin.adjust(logits), row.adjust(logits))


def test_numbers_are_uniform_and_differ_in_every_argument() -> None:
    numbers = np.array([uniform(7, 0, i) for i in range(20_000)])
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * np.sqrt(2 * 99)
    assert (
        len({uniform(1, 2, 3), uniform(2, 1, 3), uniform(1, 3, 2), uniform(1, 2, 3, 1), uniform(2**63 - 1, 0, 0)}) == 5
    )
    assert uniform(1, 2, 3) == 0.9772265191494287  # a promise: the same seed gives the same reply in every release


def test_no_seed_is_a_fresh_one() -> None:
    assert len({RowState(SamplingParams(), vocab_size=9).seed for _ in range(5)}) == 5


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-100, 100), min_size=12, max_size=12),
    st.sampled_from([1.0, 0.5, 1.7]),
    st.sampled_from([0.0, -1.0, 2.0]),
    st.sampled_from([0.0, 0.25, -2.0]),
    st.dictionaries(st.integers(0, 11), st.integers(-100, 100), max_size=4),
    st.lists(st.integers(0, 11), max_size=6),
    st.lists(st.integers(0, 11), max_size=20),
    st.integers(0, 4),
    st.none() | st.frozensets(st.integers(0, 11)),
)
def test_adjusted_logits_equal_their_plain_twin(
    logits: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    prompt: list[int],
    generated: list[int],
    least: int,
    allowed: frozenset[int] | None,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        min_tokens=least,
    )
    values, stops = [x / 16 for x in logits], frozenset({2, 5})
    mask = None if allowed is None else Fixed(allowed)
    row = RowState(params, prompt, vocab_size=12, stop_ids=stops, generated=generated, mask=mask)
    given_row = np.array(values, dtype=np.float32)
    got = row.adjust(given_row)
    np.testing.assert_allclose(got, adjusted(values, params, prompt, generated, stops, allowed), rtol=1e-5, atol=1e-5)
    assert given_row.tolist() == np.array(values, dtype=np.float32).tolist()  # the model's own logits are not changed


class Fixed:
    """A mask that always allows the same ids."""

    def __init__(self, allowed: frozenset[int], size: int = 12) -> None:
        self.bits = np.packbits([i in allowed for i in range(-(-size // 32) * 32)], bitorder="little").view(np.int32)

    def allowed(self) -> NDArray[np.int32]:
        return self.bits

    def accept(self, token: int) -> None:
        pass

    def fork(self) -> Fixed:
        return self


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    import transformers

    logits, prompt = logits_of(1), [5, 9, 5, 77]
    oracle = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt]), logits.clone())  # type: ignore[arg-type]
    row = RowState(SamplingParams(repetition_penalty=penalty), prompt, vocab_size=SIZE)
    assert np.array_equal(row.adjust(logits[0].numpy()), oracle[0].numpy())


def test_the_minimum_length_is_that_of_transformers() -> None:
    import transformers

    logits, stops = logits_of(1, 40), [3, 17]
    row = RowState(SamplingParams(min_tokens=2), [1, 2, 3], vocab_size=40, stop_ids=stops)
    for made in range(4):
        ids = torch.tensor([[1, 2, 3, *range(20, 20 + made)]])
        processor = transformers.MinNewTokensLengthLogitsProcessor(3, 2, stops)
        assert np.array_equal(row.adjust(logits[0].numpy()), processor(ids, logits.clone())[0].numpy())  # type: ignore[arg-type]
        row.append(20 + made)


def test_mask_bits_are_read_from_the_lowest_and_what_they_do_not_cover_is_out() -> None:
    row = np.zeros(70, dtype=np.float32)
    keep_allowed(row, np.array([1 | 1 << 31, 2], dtype=np.uint32).view(np.int32))
    assert np.flatnonzero(np.isfinite(row)).tolist() == [0, 31, 33]
    short = np.zeros(20, dtype=np.float32)  # a mask may be longer than the row
    keep_allowed(short, np.array([-1, -1], dtype=np.int32))
    assert np.isfinite(short).all()


def test_uses_count_past_their_first_room() -> None:
    ids = [i % 150 for i in range(400)]
    uses = Uses(ids)
    assert dict(zip(uses.ids.tolist(), uses.counts.tolist(), strict=True)) == {i: ids.count(i) for i in range(150)}


@pytest.mark.parametrize("temperature", [0, 0.6])
@pytest.mark.parametrize(
    "damage",
    [[1.0, float("nan")], [float("nan")] * 3, [1.0, float("inf")], [float("-inf")] * SIZE],
    ids=["one nan", "some nan", "infinite", "nothing finite"],
)
def test_a_damaged_row_is_an_error_and_its_neighbours_are_not(temperature: float, damage: list[float]) -> None:
    logits = logits_of(3)
    expected = Sampler().sample(logits, states(3))
    logits[1, : len(damage)] = torch.tensor(damage)
    rows = states(3)
    rows[1] = RowState(SamplingParams(temperature=temperature, repetition_penalty=1.1), [1], vocab_size=SIZE)
    first, second, third = Sampler().sample(logits, rows)
    assert second.token is None
    assert "not finite" in str(second.error)
    assert (first, third) == (expected[0], expected[2])


def test_a_row_with_nothing_left_says_so() -> None:
    row = RowState(SamplingParams(min_tokens=1), vocab_size=12, stop_ids={1}, mask=Fixed(frozenset({1})))
    sampled = Sampler().sample(logits_of(1, 12), [row])[0]
    assert sampled.token is None
    assert "no token is left" in str(sampled.error)


def test_a_mask_that_fails_is_that_rows_error() -> None:
    class Broken(Fixed):
        def allowed(self) -> NDArray[np.int32]:
            raise ConfigError("too complex")

    rows = [*states(2), RowState(SamplingParams(), vocab_size=SIZE, mask=Broken(frozenset()))]
    found = Sampler().sample(logits_of(3), rows)
    assert [s.error for s in found] == [None, None, "too complex"]


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="id 12, but the vocabulary has 12"):
        RowState(SamplingParams(logit_bias={12: 1}), vocab_size=12)


def test_a_bias_of_a_hundred_decides() -> None:
    logits = logits_of(1)
    for temperature in (0, 1):
        row = RowState(SamplingParams(temperature=temperature, logit_bias={1234: 100}), vocab_size=SIZE)
        assert Sampler().sample(logits, [row])[0].token == 1234


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_own_whatever_the_filters(dtype: torch.dtype) -> None:
    logits = logits_of(1).to(dtype)
    oracle = logits[0].double().log_softmax(-1)
    params = SamplingParams(temperature=0.3, top_k=2, logit_bias={11: 90}, logprobs=5)
    sampled = Sampler().sample(logits, [RowState(params, vocab_size=SIZE)])[0]
    assert sampled.token == 11
    assert sampled.logprob == pytest.approx(float(oracle[11]), abs=1e-5)
    best = oracle.sort(descending=True, stable=True)
    assert sampled.top is not None
    assert list(sampled.top) == best.indices[:5].tolist()
    assert list(sampled.top.values()) == pytest.approx(best.values[:5].tolist(), abs=1e-5)


def test_logprobs_are_given_when_asked_for() -> None:
    def outcome(**given: Any) -> Sampled:
        return Sampler().sample(logits_of(1), [RowState(SamplingParams(seed=1, **given), vocab_size=SIZE)])[0]

    assert (outcome().logprob, outcome().top) == (None, None)
    assert outcome(logprobs=0).top == {}
    assert outcome(logprobs=0).logprob == outcome(logprobs=3).logprob is not None
    compared = outcome(best_of=3)
    assert compared.logprob is not None
    assert compared.top is None


def test_the_distribution_is_what_is_drawn_from() -> None:
    logits = logits_of(1)[0]
    for setting in SETTINGS:
        row = RowState(SamplingParams(seed=3, **setting), [1, 2], vocab_size=SIZE, stop_ids={7})
        probs = Sampler().distribution(logits, row).dense(SIZE)
        assert probs.sum() == pytest.approx(1)
        for _ in range(20):
            token = Sampler().sample(logits[None], [row])[0].token
            assert token is not None
            assert probs[token] > 0
            row.position += 1
    row = RowState(SamplingParams(), vocab_size=SIZE)
    with pytest.raises(ConfigError, match="not finite"):
        Sampler().distribution(logits * float("nan"), row)
