"""Random lives of an engine: requests of every kind come and go at any moment, and each gets what it would have got alone.

Adapters, forms, guesses, several replies, errors, few blocks, and prompts that are equal, whose readers others wait for.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache

import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.grammar import Grammars
from herd.engine.native import runner_for
from herd.engine.pace import Pace
from herd.engine.request import Request, Sequence, TokenEvent
from herd.engine.scheduler import Scheduler
from herd.engine.speculate import Ask, Draft, Speculation
from herd.model.config import ModelConfig, plain
from herd.model.llama import Llama
from tests.build import build, tiny
from tests.engine.faulty import Faulty
from tests.engine.test_adapters import adapter
from tests.engine.words import small

SMALL = replace(
    tiny("llama-3"), dim=16, n_heads=1, n_kv_heads=1, hidden_dim=16, vocab_size=small().vocab_size, layers=plain(1),
    max_seq_len=64,
)  # fmt: skip
KINDS = 48
STEPS = 2000
"""More than any life needs: who is still there then waits for ever."""


class Guesser:
    """Right guesses, wrong ones and none at random."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.kinds: dict[str, int] = {}

    def check(self, config: ModelConfig) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass

    def draft(self, asked: Seq[Ask]) -> list[Draft]:
        return [self._one(ask) for ask in asked]

    def _one(self, ask: Ask) -> Draft:
        told, _ = alone(self.kinds[ask.sequence.request.id])[ask.sequence.index]
        ids = told[ask.sequence.made :][: self.draw.randrange(ask.count + 1)]
        ids = [*ids, *(self.draw.randrange(SMALL.vocab_size) for _ in range(self.draw.randrange(3)))]
        ids = ids[: ids.index(21)] if 21 in ids else ids  # the runner fails for the step, whoever the token is from
        return Draft(tuple(ids[: ask.count]))


@cache
def model() -> Llama:
    return build(SMALL)


@cache
def grammars() -> Grammars | None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return None
    return Grammars(small())


@cache
def kind(number: int) -> Request:
    """The requests there are: of most prompts there are several."""
    chance = random.Random(number)
    prompt = [chance.randrange(20) for _ in range(chance.randint(1, 28))]
    if number % 3 == 0:
        prompt[:8] = [1, 2, 3, 4, 5, 6, 7, 8]
    if number % 3 == 1:  # one long prompt for many, with an end of its own now and then
        prompt = [(7 * i * i) % 20 for i in range(26)] + prompt[: number % 4 // 2]
    if number % 8 == 7:
        prompt[chance.randrange(len(prompt))] = 21 + number // 8 % 2
    formed = number % 5 == 2 and grammars() is not None
    params = SamplingParams(
        temperature=1,
        seed=number,
        n=1 + number % 5 // 3,
        max_tokens=chance.randint(1, 12),
        stop_ids=frozenset({chance.randrange(20)}),
        logprobs=0 if number % 2 else None,
        prompt_logprobs=0 if number % 11 == 5 else None,
        regex="([ab]c?){1,4}" if formed else None,
    )
    stops = small().special.stop if formed else frozenset()
    return Request("alone", tuple(prompt), params, stops, adapter="one" if number % 7 == 4 else None)


def engine(**given: object) -> Engine:
    config = EngineConfig(**{"block_size": 4, "max_len": 40, "debug": True, "deterministic": True} | given)  # type: ignore[arg-type]
    made = Engine(model(), config, runner=Faulty(runner_for(model(), deterministic=True)), grammars=grammars())
    made.load_adapter("one", adapter(model(), 1, only="attention.w"))
    return made


def finish(made: Engine) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    for _ in range(STEPS):
        if not made.busy:
            return events
        events += made.step()
    raise AssertionError(f"somebody waits for ever: {list(made.scheduler.waiting)}, {made.scheduler.running}")


def said(events: Seq[TokenEvent], id: str, index: int) -> tuple[list[int], TokenEvent]:
    """The tokens of one continuation and its only end."""
    own = [e for e in events if (e.request_id, e.index) == (id, index)]
    (end,) = [e for e in own if e.finish is not None]
    assert own[-1] is end
    return [e.token for e in own if e.token is not None], end


@cache
def alone(number: int) -> dict[int, tuple[list[int], TokenEvent]]:
    made = engine(blocks=40, max_seqs=8)
    made.add(kind(number))
    events = finish(made)
    return {index: said(events, "alone", index) for index in range(kind(number).width)}


def live(seed: int) -> None:
    """One life."""
    chance = random.Random(seed)
    seqs = chance.randint(2, 6)
    made = engine(
        blocks=chance.randint(10, 30),
        max_seqs=seqs,
        max_tokens=chance.randint(seqs, 40),
        prefix_cache=chance.random() < 0.8,
    )
    guesser = Guesser(seed)
    if chance.random() < 0.5:
        made.speculation = Speculation(guesser, SMALL, pace=Pace(4, always=True))
    events: list[TokenEvent] = []
    kinds = guesser.kinds
    aborted: set[str] = set()
    for _ in range(chance.randint(5, 25)):
        act = chance.random()
        if act < 0.4:
            number = chance.randrange(KINDS)
            for _ in range(chance.choice([1, 1, 3])):  # several equal ones at once
                if kind(number).width <= seqs:
                    made.add(replace(kind(number), id=(id := f"r{len(kinds)}")))
                    kinds[id] = number
        elif act < 0.5 and kinds:
            aborted.add(id := chance.choice(list(kinds)))
            made.abort(id)
        else:
            events += made.step()
    events += finish(made)
    counts = made.pool.counts
    assert counts["free"] + counts["cached"] == counts["total"]
    for id, number in kinds.items():
        for index, (told, end) in alone(number).items():
            found, how = said(events, id, index)
            if how.finish == "abort":
                assert id in aborted
                assert found == told[: len(found)]
            elif kind(number).width > 1 and any(one.finish == "error" for _, one in alone(number).values()):
                # A bad continuation ends the others of its request, sooner or later in their lives.
                assert all(a == b for a, b in zip(found, told, strict=False))
            else:
                assert (found, how.finish, how.error) == (told, end.finish, end.error), (id, number)


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What occurred in the lives of a test: lives in which nothing happens prove nothing."""
    seen: Counter[str] = Counter()
    being_read, preempt, finish_one = Scheduler._is_being_read, Scheduler._preempt, Scheduler.finish

    def counting(self: Scheduler, candidate: Sequence, known: int, limit: int) -> bool:
        waits = being_read(self, candidate, known, limit)
        seen["waited"] += waits
        return waits

    def preempting(self: Scheduler, plan: object, victim: Sequence) -> None:
        seen["preempted"] += 1
        seen["preempted while reading"] += len(victim.tokens) - victim.computed > 1
        preempt(self, plan, victim)  # type: ignore[arg-type]

    def finishing(self: Scheduler, sequence: Sequence, reason: str) -> bool:
        reading = sequence.status == "running" and len(sequence.tokens) - sequence.computed > 1
        seen[f"{reason} while reading"] += reading
        return finish_one(self, sequence, reason)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "_is_being_read", counting)
    monkeypatch.setattr(Scheduler, "_preempt", preempting)
    monkeypatch.setattr(Scheduler, "finish", finishing)
    return seen


def test_random_lives(happened: Counter[str]) -> None:
    for seed in range(40):
        live(seed)
    for what in ("waited", "preempted", "abort while reading", "error while reading"):
        assert happened[what], what


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_two_thousand_random_lives(part: int, happened: Counter[str]) -> None:
    for seed in range(40 + 200 * part, 240 + 200 * part):
        live(seed)
    for what in ("waited", "preempted", "preempted while reading", "abort while reading", "error while reading"):
        assert happened[what], what


def test_the_requests_are_of_all_kinds() -> None:
    kinds = [kind(number) for number in range(KINDS)]
    ends = Counter(end.finish for number in range(KINDS) for _, end in alone(number).values())
    assert min(ends["stop"], ends["length"], ends["error"]) >= 3
    assert sum(one.adapter is not None for one in kinds) > 4
    assert sum(one.params.candidates > 1 for one in kinds) > 10
    assert grammars() is None or sum(one.params.constraint is not None for one in kinds) > 6
    assert torch.isfinite(model().norm.weight).all()
