"""Steps that sample on the device, and steps begun before the last one's tokens are read: nobody can tell from what comes out.

On a CPU the recordings are on a tape (tests/engine/tape.py); the same tests run on a GPU where there is one.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine.config import EngineConfig
from herd.engine.cuda_runner import CudaRunner
from herd.engine.engine import Engine
from herd.engine.request import Request, TokenEvent
from herd.engine.runner import TorchRunner
from herd.engine.sampler import RowState, Sampler, uniform
from herd.engine.static_sample import choose, kind_of
from herd.model.llama import Llama
from tests.build import fill, tiny
from tests.engine.tape import HostRead, Tape, no_reading
from tests.modes.pairs import pairs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ["llama-2", "llama-3.2", "llama-4-scout"]
BLOCKS = [14, 40]
"""Some are preempted; there is room for all."""


def requests(vocab: int, count: int = 12, seed: int = 0) -> list[Request]:
    """All kinds of sampling, stop ids that are met, some that cannot be recorded."""
    draw = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.05},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0.7, "logprobs": 2},
        {"temperature": 1.0, "min_tokens": 4},
        {"temperature": 0.9, "n": 2},
    ]
    out = []
    for i in range(count):
        prompt = tuple(draw.randrange(vocab) for _ in range(draw.randint(1, 30)))
        params = SamplingParams(max_tokens=draw.randint(4, 24), seed=i, **kinds[i % len(kinds)])
        out.append(Request(f"r{i}", prompt, params, stop_ids=frozenset(range(0, vocab, 9))))
    return out


def build(name: str, device: str = "cpu") -> Llama:
    return fill(Llama(tiny(name))).eval().to(device)


def engine(model: Llama, tape: Tape | None, **given: Any) -> Engine:
    limits = {"blocks": 40, "max_len": 96, "block_size": 8, "max_seqs": 5, "max_tokens": 48, "debug": True}
    config = EngineConfig(**(limits | given))
    if tape is None and model.norm.weight.is_cpu:
        return Engine(model, config, runner=TorchRunner(model))
    return Engine(model, config, runner=CudaRunner(model, max_seqs=5, max_len=96, capture=tape))


def replies(engine: Engine, wanted: list[Request], draw: random.Random | None = None) -> dict[Any, list[TokenEvent]]:
    """Every event of every continuation, requests arriving while others run."""
    left, events = list(wanted), defaultdict(list)
    while left or engine.busy:
        for _ in range(3 if draw is None else draw.randint(0, 3)):
            if left:
                engine.add(left.pop(0))
        for event in engine.step():
            events[event.request_id, event.index].append(event)
    return events


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "blocks"), pairs(NAMES, BLOCKS))
def test_replies_are_those_of_the_plain_engine(name: str, blocks: int, device: str) -> None:
    wanted = requests(tiny(name).vocab_size)
    expected = replies(engine(build(name), None, blocks=blocks), wanted)
    tape = Tape() if device == "cpu" else None
    for overlap in (False, True):
        own = engine(build(name, device), tape, blocks=blocks, overlap=overlap)
        found = replies(own, wanted, random.Random(1))
        assert found.keys() == expected.keys()
        for key, events in expected.items():
            assert [e.token for e in found[key]] == [e.token for e in events], key
            assert [e.finish for e in found[key]] == [e.finish for e in events], key
        assert own.scheduler.idle
        assert sum(e.finish == "stop" for events in found.values() for e in events) > 2
    if tape is not None:
        assert tape.replays > tape.made


def test_steps_overlap() -> None:
    """The next step is begun before the tokens of the last are read, which come one call later."""
    own = engine(build("llama-3"), Tape())
    own.add(Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=6)))
    assert len(own.step()) == 1  # the prompt
    assert own.step() == []
    assert own._flying is not None
    tokens = 1
    while own.busy:
        events = own.step()
        tokens += len(events)
        assert len(events) == 1
    assert tokens == 6
    assert own._flying is None


def test_ends_and_aborts_while_a_step_is_under_way() -> None:
    """A reader's stop and an abort take effect before any token of the step under way is told."""
    for how in ("abort", "stop"):
        own = engine(build("llama-3"), Tape())
        for name in ("a", "b"):
            own.add(Request(name, (1, 2, 3), SamplingParams(temperature=0, max_tokens=20)))
        while own._flying is None:
            own.step()
        own.abort("a") if how == "abort" else own.stop("a", 0)
        events = own.step()
        assert [(e.token, e.finish) for e in events if e.request_id == "a"] == [(None, how)]
        assert [e.request_id for e in events if e.token is not None] == ["b"]
        own.abort("b")
        while own.busy:
            own.step()
        own.add(Request("c", (1, 2, 3), SamplingParams(temperature=0, max_tokens=3)))
        assert len(replies(own, [])["c", 0]) == 3


@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(5, 40), marks=pytest.mark.slow)], ids=str)
def test_random_lives(seeds: range) -> None:
    """Requests that come, end and are aborted at any moment: every invariant after every step (`debug`)."""
    model, vocab = build("llama-2"), tiny("llama-2").vocab_size
    tape = Tape()
    for seed in seeds:
        draw = random.Random(seed)
        own = engine(model, tape, blocks=draw.choice([13, 20, 60]), max_seqs=draw.choice([2, 3, 5]))
        left = requests(vocab, 14, seed)
        ends = 0
        total = sum(r.params.n for r in left)
        while left or own.busy:
            if left and draw.random() < 0.4:
                own.add(left.pop())
            if draw.random() < 0.1:
                own.abort(f"r{draw.randrange(14)}")
            ends += sum(event.finish is not None for event in own.step())
        assert ends == total


def test_damaged_rows_end_alone() -> None:
    """NaN in what one request wrote: its neighbours go on, and those who get its blocks later."""
    model = build("llama-3")
    own = engine(model, Tape(), prefix_cache=False)
    for name in ("a", "b"):
        own.add(Request(name, (1, 2, 3), SamplingParams(temperature=0, max_tokens=12)))
    while own._flying is None:
        own.step()
    (bad,) = (s for s in own.scheduler.running if s.request.id == "a")
    own.cache.k[0][bad.blocks[0]] = torch.nan
    events = replies(own, [Request("c", tuple(range(20)), SamplingParams(temperature=0, max_tokens=12))])
    assert events["a", 0][-1].finish == "error"
    assert "not finite" in str(events["a", 0][-1].error)
    assert events["b", 0][-1].finish == events["c", 0][-1].finish == "length"


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_those_of_the_rows_one_by_one(device: str) -> None:
    """The recorded sampling draws what the CPU's draws, with the same random numbers, in any batch."""
    generator = torch.Generator().manual_seed(0)
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1, "top_k": 50},
        {"temperature": 1e-40},
    ]
    for trial in range(20):
        rows = [RowState(SamplingParams(**one), vocab_size=500, seed=trial, index=i) for i, one in enumerate(settings)]
        logits = 3 * torch.randn(len(rows), 500, generator=generator)
        expected = [one.token for one in Sampler().sample(logits, rows)]
        params = [row.params for row in rows]
        columns = [
            torch.tensor(values, dtype=torch.float64, device=device)
            for values in (
                [uniform(row.seed, row.index, 0) for row in rows],
                [p.temperature for p in params],
                [p.top_k for p in params],
                [p.top_p for p in params],
                [p.min_p for p in params],
            )
        ]
        found, finite = choose(logits.to(device), *columns, kind="filtered")
        assert found.tolist() == expected
        assert finite.all()
        for i in range(len(rows)):
            alone, _ = choose(logits[i : i + 1].to(device), *(c[i : i + 1] for c in columns), kind="filtered")
            assert alone.tolist() == expected[i : i + 1]


def test_what_is_not_finite_is_told_and_harms_no_neighbour() -> None:
    logits = torch.randn(4, 50)
    expected = logits[2].argmax()
    logits[0], logits[1, 3], logits[3, 3] = torch.nan, torch.inf, torch.nan
    half = torch.full((4,), 0.5, dtype=torch.float64)
    none = torch.zeros(4, dtype=torch.float64)
    for kind in ("greedy", "plain", "filtered"):
        heat = none if kind == "greedy" else torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
        tokens, finite = choose(logits, half, heat, none, half * 2, none, kind=kind)  # type: ignore[arg-type]
        assert finite.tolist() == [False, False, True, False]
        assert tokens[2] == expected
        assert ((tokens >= 0) & (tokens < 50)).all()


def test_which_rows_can_be_recorded() -> None:
    def kind(**given: Any) -> Any:
        return kind_of(RowState(SamplingParams(**({"top_p": 1} | given)), vocab_size=9, seed=0, stop_ids={3}))

    assert kind(temperature=0) == "greedy"
    assert kind(temperature=1) == "plain"
    assert kind(temperature=1, top_p=0.9) == "filtered"
    for given in (
        {"typical_p": 0.9},
        {"logprobs": 1},
        {"min_tokens": 1},
        {"presence_penalty": 1.0},
        {"logit_bias": {1: 1.0}},
    ):
        assert kind(temperature=1, **given) is None


def test_the_tape_sees_what_a_recording_cannot_do() -> None:
    """The test double itself: host reads are refused, and Python's numbers stay as they were."""
    tape, x, out = Tape(), torch.ones(3), torch.zeros(3)
    factor = [2.0]
    replay = tape(lambda: out.copy_(x * factor[0]))
    x.fill_(5.0)
    factor[0] = 3.0
    replay()
    assert out.tolist() == [10.0] * 3
    with pytest.raises(HostRead):
        tape(lambda: out.fill_(x.sum().item()))
    with pytest.raises(HostRead), no_reading():
        bool(x.sum() > 0)


def test_nothing_but_the_buffers_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed step takes its numbers from one staging buffer and one of tables, and gives ids back in one copy."""
    own = engine(build("llama-3"), Tape())
    own.add(Request("a", tuple(range(17)), SamplingParams(temperature=0, max_tokens=30)))  # blocks of 8: four until 31
    for _ in range(6):
        own.step()
    assert own._ahead is not None
    steps = own._ahead.runner.steps(own.cache)
    assert steps is not None
    held = {t.data_ptr() for t in (steps._inputs, steps._tables, steps._logits, steps._chosen, steps._outcome)}
    recorded = steps.recorded
    reads: list[int] = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.numel()) or real(t))
    for _ in range(5):
        own.step()
    assert reads == [2] * 5  # (token, finite) of one row
    assert steps.recorded == recorded
    assert held == {t.data_ptr() for t in (steps._inputs, steps._tables, steps._logits, steps._chosen, steps._outcome)}


def test_warm_up_records_every_bucket() -> None:
    tape = Tape()
    own = engine(build("llama-3"), tape)
    told: list[tuple[int, int]] = []
    assert own.warm_up(lambda done, total: told.append((done, total))) > 0
    assert told[-1] == (len(told), len(told))
    made = tape.made
    own.add(Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=4)))  # one block, as the warm-up
    assert len(replies(own, [])["a", 0]) == 4
    assert tape.made == made


def test_other_weights() -> None:
    """After parameters were replaced, neither recordings nor cached prefixes of the old ones are used."""
    model, vocab = build("llama-3"), tiny("llama-3").vocab_size
    own, wanted = engine(model, Tape()), requests(vocab, 6)
    before = replies(own, wanted)
    fill(model, seed=7)
    for layer in model.layers:
        layer.attention.wk.weight = torch.nn.Parameter(layer.attention.wk.weight.clone())
    own.weights_changed()
    again = replies(own, wanted)
    expected = replies(engine(fill(Llama(tiny("llama-3")), seed=7).eval(), None), wanted)
    tokens = [{key: [e.token for e in events] for key, events in one.items()} for one in (before, again, expected)]
    assert tokens[1] == tokens[2] != tokens[0]


class Refuses(Tape):
    """A device whose third recording fails."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.made == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().__call__(run)


def test_a_step_that_cannot_be_recorded_is_run_as_it_is() -> None:
    """It is said once, recordings end, and replies are the same."""
    wanted = requests(tiny("llama-2").vocab_size)
    expected = replies(engine(build("llama-2"), None), wanted)
    own = engine(build("llama-2"), Refuses())
    with pytest.warns(UserWarning, match="not permitted") as said:
        found = replies(own, wanted)
    assert len(said) == 1
    assert {key: [e.token for e in events] for key, events in found.items()} == {
        key: [e.token for e in events] for key, events in expected.items()
    }
