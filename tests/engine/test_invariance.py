"""A promise: what a request gets does not depend on its company. The same tokens and the same bits of their log-probabilities
alone, among 16, with prefix hits, with its prompt in pieces, and after preemption; with guesses, and held to a form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch

from herd.adapters.prefix import Prefix, Prompt, Virtual
from herd.chat.params import SamplingParams
from herd.checkpoint import packed
from herd.checkpoint.load import load_model
from herd.engine.blocks import blocks_of
from herd.engine.config import EngineConfig
from herd.engine.draft_model import ModelDrafter
from herd.engine.engine import Engine
from herd.engine.grammar import Grammars
from herd.engine.native import NativeRunner
from herd.engine.ngram import NgramDrafter
from herd.engine.pace import Pace
from herd.engine.request import Request, TokenEvent
from herd.engine.runner import Runner
from herd.engine.speculate import Drafter, Speculation
from herd.engine.tiles import TiledRunner
from herd.kernels import native
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.quant.apply import quantize
from herd.quant.linear import QuantLinear
from tests.build import build, tiny, tokens
from tests.checkpoint.gguf_files import GGML, transformers_model, write_gguf
from tests.engine.words import small
from tests.modes.pairs import pairs
from tests.quant.wide import WIDE

DENSE = replace(tiny("llama-3"), hidden_dim=192, max_seq_len=512)
MOE = replace(tiny("llama-4-scout"), dim=64, n_heads=4, hidden_dim=192, max_seq_len=512)
CONFIGS = {"dense": DENSE, "experts": MOE}
PARAMS = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=24, logprobs=3, prompt_logprobs=1)
TARGET = tuple(tokens(WIDE, 70, seed=70)[0].tolist())
OTHER = SamplingParams(temperature=1.0, max_tokens=40)
TARGET_REQUEST = Request("target", TARGET, PARAMS, score_from=40)
Told = list[tuple[int | None, float | None, dict[int, float] | None]]


@dataclass(frozen=True)
class Served:
    """A model, how it is run, and who asks."""

    model: Llama
    runner: Runner | None = None
    kv: str = "float32"
    draft: Callable[[], Drafter] | None = None
    grammars: Grammars | None = None
    target: Request = TARGET_REQUEST
    virtual: Virtual | None = None
    """An adapter that the target then has."""

    @property
    def before(self) -> int:
        """Its virtual tokens."""
        return 0 if self.virtual is None else self.virtual.count

    def engine(self, **limits: int) -> Engine:
        given = {"blocks": 400, "max_len": 160, "max_seqs": 16, "max_tokens": 512} | limits
        config = EngineConfig(**given, kv=self.kv, deterministic=True, debug=True, seed=3)  # type: ignore[arg-type]
        made = Engine(self.model, config, runner=self.runner, grammars=self.grammars)
        if self.draft is not None:
            made.speculation = Speculation(self.draft(), self.model.config, pace=Pace(5, always=True))
        if self.virtual is not None:
            made.load_adapter("virtual", self.virtual)
        return made


Way = Callable[[Served], Told]


def _others(count: int, first: int) -> list[Request]:
    """Requests of all lengths; some begin like the target."""
    out = []
    for i in range(first, first + count):
        own = tokens(WIDE, 3 + 11 * i % 83, seed=100 + i)[0].tolist()
        out.append(Request(f"other {i}", (*TARGET[: (i % 4) * 17], *own), OTHER))
    return out


def _run(engine: Engine, begin: Callable[[int], list[Request]]) -> tuple[Told, list[TokenEvent]]:
    """Steps until the target has its reply, `begin(step)` being added before each; what it was told."""
    events: list[TokenEvent] = []
    step = 0
    while not any(event.request_id == "target" and event.finish for event in events):
        for request in begin(step):
            engine.add(request)
        events += engine.step()
        step += 1
    assert all(event.error is None for event in events)
    mine = [event for event in events if event.request_id == "target"]
    told: Told = [(event.token, event.logprob, event.top_logprobs) for event in mine]
    (scored,) = [event.prompt_logprobs for event in mine if event.prompt_logprobs]
    return [*told, *((i, p, top) for i, p, top in scored)], mine


def _alone(served: Served) -> Told:
    return _run(served.engine(), lambda step: [served.target] if step == 0 else [])[0]


def _among_16(served: Served) -> Told:
    come = {0: _others(8, 0), 2: [served.target], 3: _others(7, 8)}
    return _run(served.engine(), lambda step: come.get(step, []))[0]


def _with_prefix_hits(served: Served) -> Told:
    come = {0: [Request("first", TARGET[:65], OTHER, adapter=served.target.adapter)], 5: [served.target]}
    told, events = _run(served.engine(), lambda step: come.get(step, []))
    before = served.before
    assert events[0].cached_tokens == (before + 40) // 16 * 16 - before  # of the 40 before score_from, in blocks of 16
    return told


def _in_pieces(served: Served) -> Told:
    come = {0: _others(5, 0), 1: [served.target], 2: _others(3, 20)}
    return _run(served.engine(max_tokens=19), lambda step: come.get(step, []))[0]


def _preempted(served: Served) -> Told:
    # Behind virtual tokens it has no block of the others, two of which it shares otherwise.
    virtual = 0 if served.virtual is None else blocks_of(served.before, 16) + 2
    engine = served.engine(blocks=11 + virtual, max_tokens=64)
    come = {0: _others(2, 1), 1: [served.target]}
    preempted = []

    def begin(step: int) -> list[Request]:
        preempted.extend(s.preemptions for s in engine.scheduler.sequences("target") if s.made)
        return come.get(step, [])

    told, _ = _run(engine, begin)
    assert max(preempted) > 0  # in the middle of its reply
    return told


COMPANY = (_among_16, _with_prefix_hits, _in_pieces, _preempted)
SOME = (_with_prefix_hits, _preempted)


def _check(served: Served, company: tuple[Way, ...] = COMPANY) -> Told:
    alone = _alone(served)
    assert len(alone) == 24 + 29
    for way in company:
        assert way(served) == alone, way.__name__
    return alone


needs_library = pytest.mark.skipif(native.isa() is None, reason="the native library is not built")


def _quantized(config: ModelConfig, weights: str) -> Llama:
    model = build(config)
    quantize(model, weights)
    return model


@needs_library
@pytest.mark.parametrize(("weights", "way"), pairs(["int8", "int4", "w8a8"], product(CONFIGS, ["float32", "int8"])))
def test_native_quantized_weights(weights: str, way: tuple[str, str]) -> None:
    config, kv = way
    model = _quantized(CONFIGS[config], weights)
    engine = Engine(model, EngineConfig(blocks=4, max_len=32, kv=kv))
    assert isinstance(engine.runner, NativeRunner)  # without asking for it
    _check(Served(model, kv=kv))


@needs_library
@pytest.mark.parametrize("weights", ["q4_k_m", pytest.param("q5_k_m", marks=pytest.mark.slow), "q6_k"])
def test_native_super_blocks(weights: str) -> None:
    _check(Served(_quantized(WIDE, weights)))


@needs_library
def test_a_packed_copy_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits from panels that were made in memory, from those of the start that writes them, and from mapped ones."""
    path = write_gguf(tmp_path / "model.gguf", transformers_model(WIDE), GGML.Q4_0)
    in_memory = _check(Served(load_model(path)))
    monkeypatch.setenv("HERD_PACKED", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "LEAST", 0)
    for _ in range(2):
        model = load_model(path)
        assert isinstance(model.layers[0].attention.wq, QuantLinear)
        assert _check(Served(model), (_among_16, _preempted)) == in_memory
    assert len(list((tmp_path / "cache").iterdir())) == 1


BEHIND = replace(TARGET_REQUEST, adapter="virtual")


@needs_library
@pytest.mark.parametrize(
    ("weights", "kv", "count"),
    [
        ("plain", "float32", 5),
        ("plain", "int8", 16),
        pytest.param("int4", "float32", 16, marks=pytest.mark.slow),
        pytest.param("int4", "int8", 5, marks=pytest.mark.slow),
    ],
)
def test_behind_virtual_tokens(weights: str, kv: str, count: int) -> None:
    """A prefix among requests without one: full blocks of it, and one that is partly filled."""
    model = build(DENSE) if weights == "plain" else _quantized(DENSE, weights)
    shape = DENSE.n_layers, count, DENSE.n_kv_heads, DENSE.head_dim
    generator = torch.Generator().manual_seed(count)
    prefix = Prefix(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    told = _check(Served(model, NativeRunner(model), kv=kv, target=BEHIND, virtual=prefix))
    assert told != _alone(Served(model, NativeRunner(model), kv=kv))


@pytest.mark.parametrize("company", [pytest.param(COMPANY, marks=pytest.mark.slow), SOME], ids=["every", "some"])
def test_behind_virtual_tokens_in_tiles(company: tuple[Way, ...]) -> None:
    model = build(DENSE)
    prompt = Prompt(torch.randn(7, DENSE.dim, generator=torch.Generator().manual_seed(0)))
    _check(Served(model, TiledRunner(model), target=BEHIND, virtual=prompt), company)


DRAFTS: dict[str, Callable[[], Drafter]] = {
    "lookup": lambda: NgramDrafter(5, shortest=1),
    "draft model": lambda: ModelDrafter(build(replace(DENSE, layers=DENSE.layers[:1]), seed=5), same_tokens=True),
    "the model itself": lambda: ModelDrafter(_quantized(DENSE, "int4"), same_tokens=True),
}


@needs_library
@pytest.mark.parametrize("draft", ["lookup", pytest.param("draft model", marks=pytest.mark.slow), "the model itself"])
def test_guesses_change_no_bit(draft: str) -> None:
    served = Served(_quantized(DENSE, "int4"), draft=DRAFTS[draft])
    company = COMPANY if draft == "lookup" else COMPANY[:3]  # replies that come faster are not preempted any more
    assert _check(served, company) == _alone(replace(served, draft=None))


FORMED = replace(DENSE, vocab_size=small().vocab_size)


@needs_library
@pytest.mark.parametrize("draft", [None, "lookup"])
def test_a_reply_of_a_given_form(draft: str | None) -> None:
    pytest.importorskip("llguidance")
    model = _quantized(FORMED, "int8")
    params = replace(PARAMS, regex="([a-d]{2} ){20}")
    target = replace(TARGET_REQUEST, params=params, stop_ids=small().special.stop)
    served = Served(model, grammars=Grammars(small()), target=target, draft=DRAFTS[draft] if draft else None)
    alone = _check(served)
    said = b"".join(small().bytes_of(token) for token, _, _ in alone[:24] if token is not None)
    assert set(said) <= set(b"abcd ")
    assert alone == _alone(replace(served, draft=None))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_plain_weights_when_asked(dtype: torch.dtype) -> None:
    model = build(DENSE).to(dtype)
    engine = Engine(model, EngineConfig(blocks=4, max_len=32, deterministic=True))
    assert isinstance(engine.runner, NativeRunner)
    _check(Served(model))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_tiles_of_torch_when_asked(dtype: torch.dtype) -> None:
    model = build(DENSE).to(dtype)
    _check(Served(model, TiledRunner(model)))


def test_tiles_of_experts() -> None:
    model = build(MOE)
    _check(Served(model, TiledRunner(model)), SOME)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_experts_in_every_company(dtype: torch.dtype) -> None:
    model = build(MOE).to(dtype)
    _check(Served(model, TiledRunner(model)))


def test_tiles_over_an_int8_cache() -> None:
    model = build(DENSE)
    _check(Served(model, TiledRunner(model), kv="int8"), SOME)
