"""A promise: what a request gets does not depend on its company. The same tokens and the same bits of their log-probabilities
alone, among 16, with prefix hits, with its prompt in pieces, and after preemption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.native import NativeRunner
from herd.engine.request import Request, TokenEvent
from herd.engine.runner import Runner
from herd.engine.tiles import TiledRunner
from herd.kernels import native
from herd.model.llama import Llama
from herd.quant.apply import quantize
from tests.build import build, tiny, tokens

DENSE = replace(tiny("llama-3"), hidden_dim=192, max_seq_len=512)
MOE = replace(tiny("llama-4-scout"), dim=64, n_heads=4, hidden_dim=192, max_seq_len=512)
PARAMS = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=24, logprobs=3, prompt_logprobs=1)
TARGET = tuple(tokens(DENSE, 70, seed=70)[0].tolist())
OTHER = SamplingParams(temperature=1.0, max_tokens=40)
TARGET_REQUEST = Request("target", TARGET, PARAMS, score_from=40)
Told = list[tuple[int | None, float | None, dict[int, float] | None]]
Way = Callable[[Llama, Runner | None], Told]


def _engine(model: Llama, runner: Runner | None, **limits: int) -> Engine:
    config = {"blocks": 400, "max_len": 160, "max_seqs": 16, "max_tokens": 512} | limits
    return Engine(model, EngineConfig(**config, deterministic=True, debug=True, seed=3), runner=runner)  # type: ignore[arg-type]


def _others(count: int, first: int) -> list[Request]:
    """Requests of all lengths; some begin like the target."""
    out = []
    for i in range(first, first + count):
        own = tokens(DENSE, 3 + 11 * i % 83, seed=100 + i)[0].tolist()
        out.append(Request(f"other {i}", (*TARGET[: (i % 4) * 17], *own), OTHER))
    return out


def _run(engine: Engine, begin: Callable[[int], list[Request]]) -> tuple[Told, list[TokenEvent]]:
    """Steps until idle, `begin(step)` being added before each; what the target was told."""
    events: list[TokenEvent] = []
    step = 0
    while step < 6 or engine.busy:
        for request in begin(step):
            engine.add(request)
        events += engine.step()
        step += 1
    assert all(event.error is None for event in events)
    mine = [event for event in events if event.request_id == "target"]
    told: Told = [(event.token, event.logprob, event.top_logprobs) for event in mine]
    (scored,) = [event.prompt_logprobs for event in mine if event.prompt_logprobs]
    return [*told, *((i, p, top) for i, p, top in scored)], mine


def _alone(model: Llama, runner: Runner | None) -> Told:
    return _run(_engine(model, runner), lambda step: [TARGET_REQUEST] if step == 0 else [])[0]


def _among_16(model: Llama, runner: Runner | None) -> Told:
    come = {0: _others(8, 0), 2: [TARGET_REQUEST], 3: _others(7, 8)}
    return _run(_engine(model, runner), lambda step: come.get(step, []))[0]


def _with_prefix_hits(model: Llama, runner: Runner | None) -> Told:
    come = {0: [Request("first", TARGET[:65], OTHER)], 5: [TARGET_REQUEST]}
    told, events = _run(_engine(model, runner), lambda step: come.get(step, []))
    assert events[0].cached_tokens == 32  # of the 40 before score_from, in blocks of 16
    return told


def _in_pieces(model: Llama, runner: Runner | None) -> Told:
    come = {0: _others(5, 0), 1: [TARGET_REQUEST], 2: _others(3, 20)}
    return _run(_engine(model, runner, max_tokens=19), lambda step: come.get(step, []))[0]


def _preempted(model: Llama, runner: Runner | None) -> Told:
    engine = _engine(model, runner, blocks=11, max_tokens=64)
    come = {0: _others(2, 1), 1: [TARGET_REQUEST]}
    preempted = []

    def begin(step: int) -> list[Request]:
        preempted.extend(s.preemptions for s in engine.scheduler.sequences("target") if s.made)
        return come.get(step, [])

    told, _ = _run(engine, begin)
    assert max(preempted) > 0  # in the middle of its reply
    return told


COMPANY = (_among_16, _with_prefix_hits, _in_pieces, _preempted)


def _check(model: Llama, runner: Runner | None, company: tuple[Way, ...] = COMPANY) -> None:
    alone = _alone(model, runner)
    assert len(alone) == 24 + 29
    for way in company:
        assert way(model, runner) == alone, way.__name__


needs_library = pytest.mark.skipif(native.isa() is None, reason="the native library is not built")


@needs_library
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "experts"])
def test_native_quantized_weights(weights: str, config: object) -> None:
    model = build(config)  # type: ignore[arg-type]
    quantize(model, weights)
    engine = Engine(model, EngineConfig(blocks=4, max_len=32))
    assert isinstance(engine.runner, NativeRunner)  # without asking for it
    _check(model, None)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_plain_weights_when_asked(dtype: torch.dtype) -> None:
    model = build(DENSE).to(dtype)
    engine = Engine(model, EngineConfig(blocks=4, max_len=32, deterministic=True))
    assert isinstance(engine.runner, NativeRunner)
    _check(model, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_torch_when_asked(dtype: torch.dtype) -> None:
    model = build(DENSE).to(dtype)
    _check(model, TiledRunner(model))


def test_tiles_of_experts() -> None:
    model = build(MOE)
    _check(model, TiledRunner(model), (_with_prefix_hits, _preempted))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_experts_in_every_company(dtype: torch.dtype) -> None:
    model = build(MOE).to(dtype)
    _check(model, TiledRunner(model))


def test_an_int8_cache_in_tiles() -> None:
    model = build(DENSE)
    engine = Engine(model, EngineConfig(blocks=4, max_len=32, deterministic=True, kv="int8"))
    assert isinstance(engine.runner, TiledRunner)
