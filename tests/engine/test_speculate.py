"""Acceptance alone, on rows of logits that the tests make: exact in distribution, and the very tokens without guesses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine.sample import draw
from herd.engine.sampler import RowState, Sampled, Sampler
from herd.engine.speculate import DRAFT_LANE, Draft, accept

VOCAB, LENGTH, RUNS = 5, 3, 3000
CONFIDENCE = 1e-4
"""Chance that a right implementation fails a chi-square test; seeds are fixed, so that it does so always or never."""

PARAMS = {
    "plain": {"temperature": 1.0, "top_p": 1.0},
    "filters": {"temperature": 0.8, "top_p": 0.9, "top_k": 4, "min_p": 0.02},
    "penalties": {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.5},
    "bias": {"temperature": 1.0, "top_p": 1.0, "logit_bias": {0: 1.0, 1: -100}},
}


def chain(seed: int, sharpness: float = 1.0) -> torch.Tensor:
    """Logits [V, V] of the token after each token: a model with a memory of one."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * sharpness


def row(seed: int, **params: object) -> RowState:
    return RowState(SamplingParams(seed=seed, **params), [0], vocab_size=VOCAB)  # type: ignore[arg-type]


def guesses(kind: str, model: torch.Tensor, state: RowState, token: int, count: int) -> Draft:
    """A draft of `count` tokens after `token`: by another chain, drawn (with its distributions) or its likeliest ones."""
    state, ids, weights = state.fork(), [], []
    for _ in range(count):
        q = Sampler().distribution(model[token], state).copy()
        token = draw(q, state.uniform(DRAFT_LANE)) if kind == "drawn" else int(model[token].argmax())
        ids.append(token)
        weights.append(q)
        state.append(token)
    return Draft(tuple(ids), tuple(weights) if kind == "drawn" else None)


def reply(kind: str, target: torch.Tensor, drafting: torch.Tensor, state: RowState, counts: list[int]) -> list[int]:
    """LENGTH tokens after token 0, with `counts` guesses in each step."""
    tokens = [0]
    for step in itertools.count():
        count = min(counts[step % len(counts)], LENGTH - len(tokens))
        draft = guesses(kind, drafting, state, tokens[-1], count)
        found = accept(Sampler(), target[[tokens[-1], *draft.ids]], state, draft)
        for one in found:
            assert one.token is not None
            state.append(one.token)
            tokens.append(one.token)
        if len(tokens) > LENGTH:
            return tokens[1:]
    raise AssertionError


def exact(target: torch.Tensor, params: dict[str, object]) -> np.ndarray:
    """Probabilities [V] * LENGTH of all replies."""
    out = np.zeros((VOCAB,) * LENGTH)
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        state, before, chance = row(0, **params), 0, 1.0
        for token in tokens:
            chance *= Sampler().distribution(target[before], state).dense(VOCAB)[token]
            if not chance:
                break
            state.append(token)
            before = token
        out[tokens] = chance
    return out


def fits(counts: np.ndarray, chances: np.ndarray) -> float:
    """p of a chi-square test; outcomes that are expected less than five times are taken together."""
    expected = chances.ravel() * counts.sum()
    assert not counts.ravel()[expected == 0].any(), "something impossible was drawn"
    often = expected >= 5
    seen = [*counts.ravel()[often], counts.ravel()[~often].sum()]
    wanted = [*expected[often], expected[~often].sum()]
    if wanted[-1] < 5:
        seen, wanted = [*seen[:-2], seen[-2] + seen[-1]], [*wanted[:-2], wanted[-2] + wanted[-1]]
    x2 = sum((a - b) ** 2 / b for a, b in zip(seen, wanted, strict=True))
    half = torch.tensor([(len(seen) - 1) / 2, x2 / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("kind", ["drawn", pytest.param("likeliest", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "params", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in PARAMS if name != "plain")]
)
def test_exact_in_distribution(kind: str, params: str) -> None:
    """The joint distribution of three tokens, with one to three guesses a step by a model that is often wrong."""
    target, drafting = chain(1), chain(2)
    counts = np.zeros((VOCAB,) * LENGTH)
    for seed in range(RUNS):
        tokens = reply(kind, target, drafting, row(seed, **PARAMS[params]), [3, 1, 2])
        counts[tuple(tokens)] += 1
    assert fits(counts, exact(target, PARAMS[params])) > CONFIDENCE


def test_the_test_sees_a_wrong_rule() -> None:
    """Accepting every guess, or taking the rest from p itself after a rejection, fails it."""
    target, drafting = chain(1), chain(2)
    params = PARAMS["plain"]
    chances = Sampler().distribution(target[0], row(0, **params)).dense(VOCAB)
    all_accepted, careless = np.zeros(VOCAB), np.zeros(VOCAB)
    for seed in range(RUNS):
        state = row(seed, **params)
        q = Sampler().distribution(drafting[0], state).copy()
        guess = draw(q, state.uniform(DRAFT_LANE))
        all_accepted[guess] += 1
        if state.uniform(2) * q.dense(VOCAB)[guess] >= chances[guess]:
            guess = draw(Sampler().distribution(target[0], state), state.uniform(3))
        careless[guess] += 1
    assert fits(all_accepted, chances) < CONFIDENCE
    assert fits(careless, chances) < CONFIDENCE


@pytest.mark.parametrize("params", [*PARAMS, "greedy"])
def test_guesses_without_distributions_change_no_token(params: str) -> None:
    """Whatever is guessed and however much: the tokens of a seed are those without guesses."""
    given = {"temperature": 0.0} if params == "greedy" else PARAMS[params]
    target, drafting = chain(3, 2.0), chain(4)
    for seed in range(60):
        alone = reply("likeliest", target, drafting, row(seed, **given), [0])
        for counts in ([1], [2, 1], [3]):
            assert reply("likeliest", target, drafting, row(seed, **given), counts) == alone
        assert reply("likeliest", target, target, row(seed, **given), [3]) == alone


def test_greedy_takes_the_best_whatever_the_distribution() -> None:
    target, drafting = chain(3), chain(4)
    for seed in range(50):
        state = row(seed, temperature=0.0)
        assert reply("drawn", target, drafting, state, [3]) == reply(
            "likeliest", target, drafting, row(0, temperature=0.0), [0]
        )


def test_right_guesses_are_all_taken() -> None:
    """A draft model that is the model itself: with the standard rule every guess holds."""
    target = chain(5)
    for seed in range(60):
        state = row(seed, **PARAMS["filters"])
        draft = guesses("drawn", target, state, 0, 3)
        assert len(accept(Sampler(), target[[0, *draft.ids]], state, draft)) == 4


@pytest.mark.parametrize("weights", [True, False])
def test_logprobs_are_those_of_the_model(weights: bool) -> None:
    target, drafting = chain(1), chain(2)
    for seed in range(40):
        state = row(seed, temperature=1.0, top_p=1.0, logprobs=2)
        draft = guesses("drawn" if weights else "likeliest", drafting, state, 0, 3)
        found = accept(Sampler(), target[[0, *draft.ids]], state, draft)
        before = 0
        for one in found:
            expected = target[before].log_softmax(-1)
            assert one.token is not None
            assert one.logprob == pytest.approx(float(expected[one.token]), abs=1e-5)
            assert one.top is not None
            assert list(one.top) == expected.topk(2).indices.tolist()
            before = one.token


def test_it_ends_with_a_stop_id() -> None:
    """Guesses behind a stop are not looked at, even right ones."""
    target = torch.eye(VOCAB).roll(1, 1) * 10  # 0 -> 1 -> 2 -> 3
    state = row(0, temperature=0.0)
    draft = Draft((1, 2, 3))
    tokens = [one.token for one in accept(Sampler(), target[[0, 1, 2, 3]], state, draft, frozenset([2]))]
    assert tokens == [1, 2]
    assert state.position == 0  # the caller's row is not advanced


def test_an_error_behind_the_first_row_waits() -> None:
    target = torch.eye(VOCAB).roll(1, 1) * 10
    target[2] = float("nan")
    state = row(0, temperature=0.0)
    found = accept(Sampler(), target[[0, 1, 2, 3]], state, Draft((1, 2, 3)))
    assert [one.token for one in found] == [1, 2]
    (first,) = accept(Sampler(), target[[2, 3]], state, Draft((3,)))
    assert first.token is None
    assert first.error


class Only:
    """A mask that allows 0 to `VOCAB` in order, then nothing: an error when it is asked past its end."""

    def __init__(self, at: int = 1) -> None:
        self.at = at

    def allowed(self) -> np.ndarray:
        return np.array([1 << self.at], dtype=np.int32)

    def accept(self, token: int) -> None:
        assert token == self.at, "a token that is not allowed was kept"
        self.at += 1

    def fork(self) -> Only:
        return Only(self.at)


@pytest.mark.parametrize("guessed", [(1, 2, 3), (1, 3, 4), (2, 2, 2)])
def test_a_mask_follows_the_guesses(guessed: tuple[int, ...]) -> None:
    """A constrained reply: guesses that are not allowed are wrong, and the caller's mask stays where it was."""
    state = RowState(SamplingParams(temperature=1.0, seed=1), [0], vocab_size=VOCAB, mask=Only())
    found: list[Sampled] = accept(Sampler(), chain(1)[[0, *guessed]], state, Draft(guessed))
    right = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(guessed, (1, 2, 3), strict=True))))
    assert [one.token for one in found] == [1, 2, 3, 4][: right + 1]
    assert state.mask is not None
    assert state.mask.allowed()[0] == 2
