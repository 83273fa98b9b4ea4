"""The engine: the same tokens as the naive loop, honest ends, nobody harmed by others, and nothing lost whatever happens."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from herd.chat.params import SamplingParams
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.ngram import NgramDrafter
from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache
from herd.engine.request import Request, TokenEvent
from herd.engine.runner import TorchRunner
from herd.engine.session import Session
from herd.engine.tiles import TiledRunner
from herd.errors import ConfigError, ContextFullError
from herd.model.config import plain
from herd.model.llama import Llama
from tests.build import TINY, build, tiny, tokens

MODEL = build("llama-3")
SMALL = replace(
    tiny("llama-3"), dim=16, n_heads=1, n_kv_heads=1, hidden_dim=16, vocab_size=24, layers=plain(1), max_seq_len=64
)
GREEDY = SamplingParams(temperature=0, max_tokens=12)


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


class Faulty:
    """A runner that fails for a step with token 21, and gives NaN after token 22."""

    def __init__(self, model: Llama) -> None:
        self.inner = TorchRunner(model)

    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        if (batch.tokens == 21).any():
            raise RuntimeError("token 21")
        logits = self.inner.logits(batch, cache)
        logits[batch.tokens[batch.logit_rows] == 22] = float("nan")
        return logits


@pytest.mark.parametrize(("bad", "why"), [(21, "RuntimeError: token 21"), (22, "not finite")])
@pytest.mark.parametrize("place", [2, 39])
def test_one_bad_request_ends_alone(bad: int, why: str, place: int) -> None:
    if (bad, place) == (22, 2):
        pytest.skip("no logits are wanted there")
    clean = _engine()
    prompts = {f"good {i}": tuple(t for t in _prompt(10 + i, i) if t not in (21, 22)) for i in range(7)}
    params = replace(GREEDY, logit_bias={21: -100, 22: -100})

    def run(engine: Engine, more: Sequence[Request] = ()) -> list[TokenEvent]:
        engine.runner = Faulty(MODEL)
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
    assert isinstance(engine.runner, TorchRunner)
    assert isinstance(_engine(kv="int8", deterministic=True).runner, TiledRunner)


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


def _random_life(seed: int, model: Llama, alone: Callable[[int], dict[int, tuple[list[int], TokenEvent]]]) -> None:
    """One random life of an engine: requests come and go at any moment, and each gets what it would have got alone."""
    chance = random.Random(seed)
    seqs = chance.randint(2, 6)
    config = EngineConfig(
        blocks=chance.randint(8, 30),
        block_size=4,
        max_len=32,
        max_seqs=seqs,
        max_tokens=chance.randint(seqs, 40),
        prefix_cache=chance.random() < 0.8,
        deterministic=True,
        debug=True,
    )
    engine = Engine(model, config, runner=Faulty(model))
    events: list[TokenEvent] = []
    kinds: dict[str, int] = {}
    aborted: set[str] = set()
    for _ in range(chance.randint(5, 25)):
        act = chance.random()
        if act < 0.35:
            kind = chance.randrange(KINDS)
            if _kind(kind).width <= seqs:
                id = f"r{len(kinds)}"
                engine.add(replace(_kind(kind), id=id))
                kinds[id] = kind
        elif act < 0.45 and kinds:
            aborted.add(id := chance.choice(list(kinds)))
            engine.abort(id)
        else:
            events += engine.step()
    events += _finish(engine)
    counts = engine.pool.counts
    assert counts["free"] + counts["cached"] == counts["total"]
    for id, kind in kinds.items():
        for index, (told, end) in alone(kind).items():
            found, how = _said(events, id, index), _end(events, id, index)
            if how.finish == "abort":
                assert id in aborted
                assert found == told[: len(found)]
            elif _kind(kind).width > 1 and any(one.finish == "error" for _, one in alone(kind).values()):
                # A bad continuation ends the others of its request, sooner or later in their lives.
                assert all(a == b for a, b in zip(found, told, strict=False))
            else:
                assert (found, how.finish, how.error) == (told, end.finish, end.error)


KINDS = 24


def _kind(kind: int) -> Request:
    chance = random.Random(kind)
    prompt = [chance.randrange(20) for _ in range(chance.randint(1, 28))]
    if kind % 3 == 0:
        prompt[:8] = [1, 2, 3, 4, 5, 6, 7, 8]
    if kind % 8 == 7:
        prompt[chance.randrange(len(prompt))] = 21 + kind // 8 % 2
    params = SamplingParams(
        temperature=1,
        seed=kind,
        n=1 + kind % 5 // 3,
        max_tokens=chance.randint(1, 12),
        stop_ids=frozenset({chance.randrange(20)}),
        logprobs=0 if kind % 2 else None,
    )
    return Request("alone", tuple(prompt), params)


def _lives(first: int, count: int) -> None:
    model = build(SMALL)
    known: dict[int, dict[int, tuple[list[int], TokenEvent]]] = defaultdict(dict)

    def alone(kind: int) -> dict[int, tuple[list[int], TokenEvent]]:
        if kind not in known:
            config = EngineConfig(blocks=40, block_size=4, max_len=32, max_seqs=8, debug=True)
            engine = Engine(model, config, runner=Faulty(model))
            events = _once(engine, _kind(kind))
            for index in range(_kind(kind).width):
                known[kind][index] = _said(events, "alone", index), _end(events, "alone", index)
        return known[kind]

    for seed in range(first, first + count):
        _random_life(seed, model, alone)


def test_random_lives() -> None:
    _lives(0, 40)


@pytest.mark.slow
def test_two_thousand_random_lives() -> None:
    _lives(40, 2000)


def test_starting_imports_no_compiler() -> None:
    """torch's compiler and sympy are a second and 80 MB of every start, and nothing on a CPU needs them."""
    code = (
        "import sys, herd.engine.llm, herd.checkpoint.load, herd.cli.run; "
        "sys.exit(', '.join(sorted({'torch._dynamo', 'sympy', 'triton'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
