"""The naive session: it says what the full forward says, reuses what it has, and stays usable whatever happens to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine import session as session_module
from herd.engine.beam import beam_search
from herd.engine.session import Session
from herd.errors import ConfigError, ContextFullError, HerdError
from herd.model.llama import Llama
from tests.build import TINY, build, tokens

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def prompt_of(model: Llama, length: int, seed: int = 1) -> list[int]:
    return tokens(model.config, length, seed=seed)[0].tolist()


def full_forward_greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    """The oracle: every token from a forward over everything, without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


class Counting(Session):
    """A session that counts the positions it computes."""

    def __init__(self, model: Llama, *, max_len: int | None = None) -> None:
        super().__init__(model, max_len=max_len)
        self.computed = 0

    def _forward(self, ids):
        self.computed += len(ids)
        return super()._forward(ids)


@pytest.mark.parametrize("name", TINY)
def test_greedy_is_the_full_forward(name: str) -> None:
    model = build(name)
    prompt = prompt_of(model, 20)
    assert list(Session(model).generate(prompt, GREEDY)) == full_forward_greedy(model, prompt, 12)


@pytest.mark.parametrize("name", ["llama-3", "llama-4-scout"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 17])
def test_any_prefill_chunk_gives_the_same_ids(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    prompt = prompt_of(model, 40)
    expected = list(Session(model).generate(prompt, GREEDY))
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", chunk)
    calls: list[tuple[int, int]] = []
    assert list(Session(model).generate(prompt, GREEDY, on_prefill=lambda *at: calls.append(at))) == expected
    assert calls[-1] == (40, 40)
    assert [done for done, _ in calls] == [min(at + chunk, 40) for at in range(0, 40, chunk)]


def test_a_longer_prompt_reuses_the_cache_and_gives_the_same_ids() -> None:
    model = build("llama-3")
    session = Counting(model)
    first = prompt_of(model, 30)
    reply = list(session.generate(first, GREEDY))
    assert session.computed == 30 + 11  # the last token is made but never run
    second = [*first, *reply, *prompt_of(model, 7, seed=2)]
    session.computed = 0
    ids = list(session.generate(second, GREEDY))
    assert ids == list(Session(model).generate(second, GREEDY))
    assert session.computed == 1 + 7 + 11


def test_the_same_prompt_again_runs_one_token() -> None:
    model = build("llama-3")
    session = Counting(model)
    prompt = prompt_of(model, 30)
    one = SamplingParams(temperature=0, max_tokens=1)
    first = list(session.generate(prompt, one))
    session.computed = 0
    assert list(session.generate(prompt, one)) == first
    assert session.computed == 1


@pytest.mark.parametrize("shared", [0, 1, 13, 29])
def test_a_prompt_that_parts_from_the_last_one_is_as_if_fresh(shared: int) -> None:
    model = build("llama-4-scout")
    session = Counting(model)
    first = prompt_of(model, 30)
    list(session.generate(first, GREEDY))
    other = [*first[:shared], (first[shared] + 1) % model.config.vocab_size, *prompt_of(model, 20, seed=3)]
    session.computed = 0
    assert list(session.generate(other, GREEDY)) == full_forward_greedy(model, other, 12)
    assert session.computed == len(other) - shared + 11


def test_a_shorter_prompt_works_after_a_longer_one() -> None:
    model = build("llama-3")
    session = Session(model)
    long = prompt_of(model, 50)
    list(session.generate(long, GREEDY))
    assert list(session.generate(long[:9], GREEDY)) == full_forward_greedy(model, long[:9], 12)


def test_the_cache_grows_and_keeps_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "FIRST_ALLOCATION", 4)
    model = build("llama-3")
    session = Session(model, max_len=70)
    prompt = prompt_of(model, 11)
    params = SamplingParams(temperature=0, max_tokens=50)
    assert session.cache.max_len == 4
    assert list(session.generate(prompt, params)) == full_forward_greedy(model, prompt, 50)
    assert 60 <= session.cache.max_len <= 70


def test_memory_is_not_taken_before_it_is_needed() -> None:
    session = Session(build("llama-3.1"))
    assert session.max_len == 131_072
    assert session.cache.max_len == session_module.FIRST_ALLOCATION


def test_growth_that_fails_half_way_leaves_the_session_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    from herd.engine import cache as cache_module

    monkeypatch.setattr(session_module, "FIRST_ALLOCATION", 16)
    model = build("llama-3")
    session = Session(model)
    prompt = prompt_of(model, 10)
    longer, calls = cache_module._longer, 0

    def interrupted(old: torch.Tensor, max_len: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return longer(old, max_len)

    monkeypatch.setattr(cache_module, "_longer", interrupted)
    params = SamplingParams(temperature=0, max_tokens=40)
    with pytest.raises(KeyboardInterrupt):
        list(session.generate(prompt, params))
    assert list(session.generate(prompt, params)) == full_forward_greedy(model, prompt, 40)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_an_abandoned_iterator_leaves_the_session_usable(taken: int) -> None:
    model = build("llama-3")
    session = Session(model)
    prompt = prompt_of(model, 30)
    left = session.generate(prompt, GREEDY)
    for _ in range(taken):
        next(left)
    other = prompt_of(model, 25, seed=4)
    assert list(session.generate(other, GREEDY)) == full_forward_greedy(model, other, 12)
    if taken:
        with pytest.raises(RuntimeError, match="another reply"):
            next(left)
    assert list(session.generate(prompt, GREEDY)) == full_forward_greedy(model, prompt, 12)


def test_inference_mode_does_not_leak_between_two_tokens() -> None:
    session = Session(build("llama-3"))
    for _ in session.generate([1, 2, 3], GREEDY):
        assert not torch.is_inference_mode_enabled()


def test_a_stop_id_ends_the_reply_and_is_part_of_it() -> None:
    model = build("llama-3")
    prompt = prompt_of(model, 20)
    ids = list(Session(model).generate(prompt, GREEDY))
    stop = ids[4]
    until = ids[: ids.index(stop) + 1]
    assert list(Session(model).generate(prompt, GREEDY, frozenset({stop}))) == until
    by_params = SamplingParams(temperature=0, max_tokens=12, stop_ids=frozenset({stop}))
    assert list(Session(model).generate(prompt, by_params)) == until
    ignoring = SamplingParams(temperature=0, max_tokens=12, ignore_stop_ids=True, stop_ids=frozenset({stop}))
    assert list(Session(model).generate(prompt, ignoring, frozenset({stop}))) == ids


def test_the_context_fills_up_to_its_last_position() -> None:
    model = build("llama-3")
    prompt = prompt_of(model, 20)
    endless = SamplingParams(temperature=0)
    session = Session(model, max_len=32)
    assert list(session.generate(prompt, endless)) == full_forward_greedy(model, prompt, 12)
    assert list(Session(model, max_len=21).generate(prompt, endless)) == full_forward_greedy(model, prompt, 1)


@pytest.mark.parametrize("length", [32, 33, 1000])
def test_a_prompt_without_room_for_a_reply_is_refused(length: int) -> None:
    model = build("llama-3")
    session = Counting(model, max_len=32)
    with pytest.raises(ContextFullError, match="no room for a reply") as caught:
        next(iter(session.generate(prompt_of(model, length), GREEDY)))
    assert (caught.value.needed, caught.value.available) == (length + 1, 32)
    assert session.computed == 0
    short = prompt_of(model, 5)
    assert list(session.generate(short, GREEDY)) == full_forward_greedy(model, short, 12)


@pytest.mark.parametrize("bad", [-1, 384, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(bad: int) -> None:
    session = Session(build("llama-3"))
    with pytest.raises(ConfigError, match=f"token id {bad} is outside"):
        next(iter(session.generate([1, bad, 2], GREEDY)))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        next(iter(Session(build("llama-3")).generate([], GREEDY)))


@pytest.mark.parametrize(
    ("max_len", "words"), [(8193, "made for 8192"), (10**9, "made for 8192"), (1, "at least 2"), (-5, "at least 2")]
)
def test_an_impossible_context_is_refused(max_len: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Session(build("llama-3"), max_len=max_len)


def test_a_model_that_gives_nan_is_not_believed() -> None:
    model = build("llama-3")
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    session = Session(model)
    for params in (GREEDY, SamplingParams(seed=1)):
        with pytest.raises(HerdError, match="not finite"):
            next(iter(session.generate([1, 2, 3], params)))


def test_a_seed_repeats_a_reply_and_no_seed_varies_it() -> None:
    model = build("llama-3")
    prompt = prompt_of(model, 8)

    def reply(seed: int | None) -> tuple[int, ...]:
        params = SamplingParams(temperature=1, top_p=1, max_tokens=16, seed=seed)
        return tuple(Session(model).generate(prompt, params))

    assert reply(7) == reply(7)
    assert len({reply(seed) for seed in range(5)}) == 5
    assert len({reply(None) for _ in range(5)}) > 1


def test_the_repetition_penalty_counts_prompt_and_reply() -> None:
    model = build("llama-3")
    prompt = prompt_of(model, 20)
    # So strong that nothing is ever said twice, and nothing of the prompt either (while a positive logit is left).
    ids = list(Session(model).generate(prompt, SamplingParams(temperature=0, repetition_penalty=1e6, max_tokens=40)))
    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(prompt)


@pytest.mark.parametrize("name", ["llama-3", "llama-4-scout"])
@pytest.mark.parametrize("first", [4, 256])
def test_beam_search_is_that_of_full_forwards(name: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "FIRST_ALLOCATION", first)
    model = build(name)
    prompt, stops = prompt_of(model, 30), frozenset(range(0, model.config.vocab_size, 40))

    def step(hypotheses: list[tuple[int, ...]]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([[*prompt, *ids] for ids in hypotheses]))[:, -1].float().numpy()

    params = SamplingParams(temperature=0, beams=4, n=3, max_tokens=10, min_tokens=2)
    session = Session(model)
    expected = beam_search(step, params, stops, 10)
    for _ in range(2):  # the second time from the cache
        found = session.search(prompt, params, stops)
        assert [(b.tokens, b.finish) for b in found] == [(b.tokens, b.finish) for b in expected]
        assert [b.score for b in found] == pytest.approx([b.score for b in expected], abs=1e-4)
    assert list(session.generate(prompt, GREEDY)) == full_forward_greedy(model, prompt, 12)


def test_beam_search_ends_with_the_context_and_refuses_what_it_cannot_do() -> None:
    model = build("llama-3")
    prompt = prompt_of(model, 20)
    session = Session(model, max_len=26)
    found = session.search(prompt, SamplingParams(temperature=0, beams=3, n=3))
    assert [len(beam.tokens) for beam in found] == [6, 6, 6]
    with pytest.raises(ConfigError, match="at least 2"):
        session.search(prompt, GREEDY)
    with pytest.raises(ConfigError, match=r"beams: use Session\.search"):
        next(iter(session.generate(prompt, SamplingParams(temperature=0, beams=3))))
