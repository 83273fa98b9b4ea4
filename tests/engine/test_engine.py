"""The engine: the same tokens as the naive loop, honest ends, nobody harmed by others, and nothing lost whatever happens."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from herd.chat.params import SamplingParams
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.grammar import Grammar, Grammars
from herd.engine.native import NativeRunner
from herd.engine.ngram import NgramDrafter
from herd.engine.pack import RaggedBatch
from herd.engine.paged import KV_DTYPES, PagedCache
from herd.engine.request import Request, TokenEvent
from herd.engine.runner import TorchRunner
from herd.engine.session import Session
from herd.engine.tiles import TiledRunner
from herd.errors import ConfigError, ContextFullError
from herd.kernels import native
from herd.model.config import plain
from herd.model.llama import Llama
from tests.build import TINY, build, tiny, tokens
from tests.engine.faulty import Faulty
from tests.engine.words import small

MODEL = build("llama-3")
SMALL = replace(
    tiny("llama-3"), dim=16, n_heads=1, n_kv_heads=1, hidden_dim=16, vocab_size=24, layers=plain(1), max_seq_len=64
)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
KV = [str(dtype).removeprefix("torch.") for dtype in KV_DTYPES]


def _engine(model: Llama = MODEL, **limits: object) -> Engine:
    given = {"blocks": 64, "max_len": 200, "debug": True} | limits
    return Engine(model, EngineConfig(**given))  # type: ignore[arg-type]


def _prompt(length: int, seed: int = 0, model: Llama = MODEL) -> tuple[int, ...]:
    return tuple(tokens(model.config, length, seed=seed)[0].tolist())


def _finish(engine: Engine) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while engine.busy:
        events += engine.step()
    return events


def _said(events: Sequence[TokenEvent], request_id: str, index: int = 0) -> list[int]:
    return [e.token for e in events if (e.request_id, e.index) == (request_id, index) and e.token is not None]


def _end(events: Sequence[TokenEvent], request_id: str, index: int = 0) -> TokenEvent:
    (end,) = [e for e in events if (e.request_id, e.index) == (request_id, index) and e.finish is not None]
    return end


@pytest.mark.parametrize("name", TINY)
def test_the_tokens_are_those_of_the_naive_loop(name: str) -> None:
    model = build(name)
    engine = _engine(model, max_tokens=40)
    sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=12)
    asked = {
        f"{i} {params.temperature}": (_prompt(3 + 13 * i, i, model), params)
        for i in range(4)
        for params in (GREEDY, sampled)
    }
    for id, (prompt, params) in asked.items():
        engine.add(Request(id, prompt, params))
    events = _finish(engine)
    for id, (prompt, params) in asked.items():
        assert _said(events, id) == list(Session(model).generate(prompt, params)), id
        assert _end(events, id).finish == "length"


def test_a_stop_id_is_told_and_ends_it() -> None:
    engine = _engine()
    (told,) = [_said(_once(engine, Request("a", _prompt(9), GREEDY)), "a")]
    for stops in ({"stop_ids": frozenset({told[4]})}, {"params": replace(GREEDY, stop_ids=frozenset({told[4]}))}):
        events = _once(engine, Request("b", _prompt(9), **({"params": GREEDY} | stops)))  # type: ignore[arg-type]
        assert _said(events, "b") == told[: told.index(told[4]) + 1]
        assert _end(events, "b").finish == "stop"
    ignoring = replace(GREEDY, ignore_stop_ids=True, stop_ids=frozenset({told[4]}))
    assert _said(_once(engine, Request("c", _prompt(9), ignoring, frozenset({told[2]}))), "c") == told
    late = replace(GREEDY, stop_ids=frozenset({told[0]}), min_tokens=6)
    events = _once(engine, Request("d", _prompt(9), late))
    assert told[0] not in _said(events, "d")[:6]


def _once(engine: Engine, request: Request) -> list[TokenEvent]:
    engine.add(request)
    return _finish(engine)


def test_the_context_is_an_end_too() -> None:
    events = _once(_engine(max_len=30), Request("a", _prompt(20), SamplingParams()))
    assert len(_said(events, "a")) == 10
    assert _end(events, "a").finish == "context_full"


def test_continuations_share_the_prompt_and_differ() -> None:
    engine = _engine()
    request = Request("a", _prompt(40), SamplingParams(temperature=1, seed=1, n=3, max_tokens=10))
    events = _once(engine, request)
    replies = [_said(events, "a", i) for i in range(3)]
    assert len({tuple(reply) for reply in replies}) == 3
    assert [_end(events, "a", i).finish for i in range(3)] == ["length"] * 3
    alone = _once(engine, Request("b", _prompt(40), replace(request.params, n=1)))
    assert _said(alone, "b") == replies[0]
    assert engine.stats().prompt_tokens == 80


def test_log_probabilities_are_those_of_the_model() -> None:
    prompt = _prompt(40)
    events = _once(_engine(max_tokens=16), Request("a", prompt, replace(GREEDY, logprobs=2, prompt_logprobs=1)))
    told = _said(events, "a")
    with torch.inference_mode():
        expected = MODEL(torch.tensor([[*prompt, *told]]))[0].log_softmax(-1)
    (scored,) = [e.prompt_logprobs for e in events if e.prompt_logprobs is not None]
    found = [(*one[:2], one[2]) for one in scored] + [(e.token, e.logprob, e.top_logprobs) for e in events]
    assert len(found) == 39 + 12
    for at, (token, logprob, top) in enumerate(found):
        assert logprob == pytest.approx(float(expected[at, token]), abs=1e-4)
        best = expected[at].topk(len(top or {}))
        assert list(top or {}) == best.indices.tolist()
        assert list((top or {}).values()) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_scoring_a_late_part_uses_the_cache_before_it() -> None:
    engine, prompt = _engine(), _prompt(60)
    params = replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    (whole,) = [e.prompt_logprobs for e in _once(engine, Request("a", prompt, params))]
    (event,) = _once(engine, Request("b", prompt, params, score_from=50))
    assert event.cached_tokens == 48
    assert [one[0] for one in event.prompt_logprobs or ()] == list(prompt[51:])
    assert [one[1] for one in event.prompt_logprobs or ()] == pytest.approx(
        [one[1] for one in whole or ()][50:], abs=1e-5
    )


def test_what_began_the_same_way_is_not_computed_again() -> None:
    engine = _engine()
    first = _once(engine, Request("a", _prompt(50), GREEDY))
    again = _once(engine, Request("b", _prompt(50), GREEDY))
    assert _said(first, "a") == _said(again, "b")
    assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 48)
    assert engine.stats().prefix_hits == 48 / 100
    (salted,) = {e.cached_tokens for e in _once(engine, Request("c", _prompt(50), GREEDY, salt="other tenant"))}
    assert salted == 0
    without = _engine(prefix_cache=False)
    _once(without, Request("a", _prompt(50), GREEDY))
    assert _once(without, Request("b", _prompt(50), GREEDY))[0].cached_tokens == 0


def test_what_cannot_run_is_refused_at_once() -> None:
    engine = _engine(max_len=50, max_seqs=4)
    with pytest.raises(ContextFullError, match="has 50 tokens and the context holds 50") as full:
        engine.add(Request("a", _prompt(50), GREEDY))
    assert (full.value.needed, full.value.available) == (51, 50)
    for params, why in (
        (SamplingParams(n=5), "5 continuations, and at most 4"),
        (SamplingParams(logit_bias={10_000: 1}), "outside the model's vocabulary"),
    ):
        with pytest.raises(ConfigError, match=why):
            engine.add(Request("a", (1, 2), params))
    with pytest.raises(ConfigError, match="token id 384 is outside"):
        engine.add(Request("a", (1, 384), GREEDY))
    with pytest.raises(ConfigError, match="adapter 'x'"):
        engine.add(Request("a", (1, 2), GREEDY, adapter="x"))
    with pytest.raises(ConfigError, match="score_from 2"):
        engine.add(Request("a", (1, 2), GREEDY, score_from=2))
    assert not engine.busy
    engine.add(Request("a", (1, 2), GREEDY))
    with pytest.raises(ConfigError, match="already running"):
        engine.add(Request("a", (1, 2), GREEDY))
    _finish(engine)
    engine.add(Request("a", (1, 2), GREEDY))  # the id is free again
    assert len(_finish(engine)) == 12


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_ends_it_at_any_moment_and_again(steps: int) -> None:
    engine = _engine(max_tokens=16)
    engine.abort("a")
    engine.add(Request("a", _prompt(40), SamplingParams(temperature=1, n=2, seed=1)))
    engine.add(Request("b", _prompt(9), GREEDY))
    events = [event for _ in range(steps) for event in engine.step()]
    engine.abort("a")
    engine.abort("a")
    events += engine.step()
    engine.abort("a")
    assert [_end(events, "a", i).finish for i in (0, 1)] == ["abort", "abort"]
    events += _finish(engine)
    assert _said(events, "b") == list(Session(MODEL).generate(_prompt(9), GREEDY))
    assert engine.pool.counts["used"] == 0


def test_a_reader_can_stop_one_continuation() -> None:
    engine = _engine()
    engine.add(Request("a", _prompt(9), SamplingParams(temperature=1, n=2, seed=1, max_tokens=20)))
    events = engine.step() + engine.step() + engine.step()
    engine.stop("a", 1)
    engine.stop("a", 7)
    events += _finish(engine)
    assert (_end(events, "a", 0).finish, len(_said(events, "a", 0))) == ("length", 20)
    assert (_end(events, "a", 1).finish, len(_said(events, "a", 1))) == ("stop", 2)


def test_requests_without_a_seed_get_one_from_the_engine() -> None:
    params = SamplingParams(temperature=1, max_tokens=8)

    def replies(seed: int | None) -> list[list[int]]:
        engine = _engine(seed=seed)
        for id in "ab":
            engine.add(Request(id, _prompt(5), params))
        events = _finish(engine)
        return [_said(events, id) for id in "ab"]

    assert replies(0) == replies(0)
    assert replies(0)[0] != replies(0)[1]
    assert replies(0) != replies(1)
    assert replies(None) != replies(None)


def test_guesses_change_nothing_but_the_number_of_steps() -> None:
    prompt = _prompt(8) * 6
    plain_run = _engine()
    expected = _once(plain_run, Request("a", prompt, replace(GREEDY, max_tokens=60)))
    guessing = Engine(MODEL, plain_run.config, drafter=NgramDrafter())
    assert guessing.speculation is not None
    guessing.speculation.pace.always = True
    found = _once(guessing, Request("a", prompt, replace(GREEDY, max_tokens=60)))
    assert _said(found, "a") == _said(expected, "a")
    assert guessing.stats().steps < plain_run.stats().steps


@pytest.mark.parametrize(("bad", "why"), [(21, "RuntimeError: token 21"), (22, "not finite")])
@pytest.mark.parametrize("place", [2, 39])
def test_one_bad_request_ends_alone(bad: int, why: str, place: int) -> None:
    if (bad, place) == (22, 2):
        pytest.skip("no logits are wanted there")
    clean = _engine()
    prompts = {f"good {i}": tuple(t for t in _prompt(10 + i, i) if t not in (21, 22)) for i in range(7)}
    params = replace(GREEDY, logit_bias={21: -100, 22: -100})

    def run(engine: Engine, more: Sequence[Request] = ()) -> list[TokenEvent]:
        engine.runner = Faulty(TorchRunner(MODEL))
        for id, prompt in prompts.items():
            engine.add(Request(id, prompt, params))
        for request in more:
            engine.add(request)
        return _finish(engine)

    expected = run(clean)
    prompt = (*_prompt(place, 99), bad)
    engine = _engine()
    events = run(engine, [Request("bad", prompt, replace(params, temperature=1, n=2))])
    for i in (0, 1):
        end = _end(events, "bad", i)
        assert (end.finish, why in (end.error or "")) == ("error", True)
    for id in prompts:
        assert _said(events, id) == _said(expected, id)
    assert engine.stats().errors == 1
    assert engine.pool.lookup(prompt)[0] == []  # nothing of it is found again


def test_an_interrupt_in_a_step_loses_nothing() -> None:
    class Interrupted(TorchRunner):
        calls = 0

        def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().logits(batch, cache)

    config = _engine().config
    engine = Engine(MODEL, config, runner=Interrupted(MODEL))
    engine.add(Request("a", _prompt(9), GREEDY))
    events = engine.step() + engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    events += _finish(engine)
    assert _said(events, "a") == list(Session(MODEL).generate(_prompt(9), GREEDY))


def test_an_int8_cache_runs() -> None:
    engine = _engine(kv="int8")
    events = _once(engine, Request("a", _prompt(30), GREEDY))
    assert len(_said(events, "a")) == 12


def test_a_last_look_that_fails_ends_its_reply_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong when a complete reply is held against its form."""
    pytest.importorskip("llguidance")
    grammars = Grammars(small(), vocab_size=MODEL.config.vocab_size)
    stops = small().special.stop
    engine = Engine(MODEL, _engine().config, grammars=grammars)
    monkeypatch.setattr(Grammar, "check", lambda self, text: 1 // 0)
    engine.add(Request("a", _prompt(9), SamplingParams(regex="[ab]{3}", max_tokens=9), stops))
    engine.add(Request("b", _prompt(9), GREEDY))
    events = _finish(engine)
    assert _end(events, "a").finish == "error"
    assert "ZeroDivisionError" in (_end(events, "a").error or "")
    assert _said(events, "b") == list(Session(MODEL).generate(_prompt(9), GREEDY))


@pytest.mark.parametrize("again", [False, True], ids=["interrupt", "interrupt in the next one, too"])
def test_an_interrupt_before_the_copies_loses_none(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuations of one prompt get a copy each of its last block; a step that is interrupted before leaves them due."""
    request = Request("a", _prompt(41), SamplingParams(temperature=1, seed=1, n=3, max_tokens=10))
    expected = _once(_engine(), request)
    engine = _engine()
    copy, calls, made = engine.cache.copy, [], []

    def interrupted(pairs: list[tuple[int, int]]) -> None:
        calls.append(len(pairs))
        if len(calls) <= 1 + again:
            raise KeyboardInterrupt
        made.extend(pairs)
        copy(pairs)

    monkeypatch.setattr(engine.cache, "copy", interrupted)
    engine.add(request)
    events = engine.step()
    for _ in range(1 + again):
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    events += _finish(engine)
    assert len(made) == 2
    for index in range(3):
        assert _said(events, "a", index) == _said(expected, "a", index)


def test_copies_that_fail_end_their_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is computed over a block that was not copied."""
    engine = _engine()
    copy = engine.cache.copy

    def failing(pairs: list[tuple[int, int]]) -> None:
        monkeypatch.setattr(engine.cache, "copy", copy)
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.cache, "copy", failing)
    events = _once(engine, Request("a", _prompt(41), SamplingParams(temperature=1, seed=1, n=2, max_tokens=10)))
    assert [_end(events, "a", i).error for i in (0, 1)] == ["RuntimeError: no memory"] * 2
    assert _said(_once(engine, Request("b", _prompt(9), GREEDY)), "b") == list(
        Session(MODEL).generate(_prompt(9), GREEDY)
    )


@pytest.mark.skipif(native.isa() is None, reason="the native library is not built")
@pytest.mark.parametrize("kv", KV)
def test_every_cache_is_read_by_the_native_kernels(kv: str) -> None:
    """Also that of int8: through torch a step took three times as long."""
    for deterministic in (False, True):
        assert isinstance(_engine(kv=kv, deterministic=deterministic).runner, NativeRunner)


def test_without_the_library_every_cache_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "it is not built")
    for kv in KV:
        assert isinstance(_engine(kv=kv).runner, TorchRunner)
        assert isinstance(_engine(kv=kv, deterministic=True).runner, TiledRunner)


def test_add_and_abort_from_other_threads() -> None:
    engine = _engine(max_seqs=8, max_tokens=64, debug=False)
    expected = {i: list(Session(MODEL).generate(_prompt(5 + i, i), GREEDY)) for i in range(6)}
    done = threading.Event()
    events: list[TokenEvent] = []

    def step() -> None:
        while not done.is_set() or engine.busy:
            events.extend(engine.step())

    def ask(worker: int) -> None:
        chance = random.Random(worker)
        for i in range(30):
            which = chance.randrange(6)
            engine.add(Request(f"{worker}-{i}-{which}", _prompt(5 + which, which), GREEDY))
            if chance.random() < 0.4:
                engine.abort(f"{worker}-{chance.randrange(i + 1)}-{which}")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    stepper = threading.Thread(target=step)
    for thread in (stepper, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    stepper.join()
    for worker in range(4):
        for i in range(30):
            id = next(e.request_id for e in events if e.request_id.startswith(f"{worker}-{i}-"))
            told, end = _said(events, id), _end(events, id)
            assert told == expected[int(id[-1])][: len(told)]
            assert end.finish == ("length" if len(told) == 12 else "abort")
