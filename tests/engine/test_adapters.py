"""Adapters beside their base: rows equal the merged model, neighbours and the base notice nothing, and wrong ones are refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from herd.adapters.lora import Factors, LoraAdapter
from herd.chat.params import SamplingParams
from herd.checkpoint.gguf_lora import write_gguf_lora
from herd.checkpoint.names import shapes
from herd.checkpoint.peft import write_peft
from herd.engine.adapted import LoraLinear, LoraMoE
from herd.engine.adapters import AdapterRunner, AdapterSet
from herd.engine.config import EngineConfig
from herd.engine.draft_model import ModelDrafter
from herd.engine.engine import Engine
from herd.engine.native import NativeRunner, runner_for
from herd.engine.ngram import NgramDrafter
from herd.engine.pace import Pace
from herd.engine.pack import RaggedBatch, pack
from herd.engine.paged import PagedCache
from herd.engine.request import Request, Sequence
from herd.engine.runner import Runner, TorchRunner
from herd.engine.scheduler import Chunk, StepPlan
from herd.engine.speculate import Speculation
from herd.engine.tiles import TiledRunner
from herd.errors import CheckpointError, ConfigError
from herd.kernels import native
from herd.model.llama import Llama
from herd.quant.apply import dequantize, quantize
from tests.build import TINY, build
from tests.quant.wide import EXPERTS

MERGED = 2e-5
"""float32 logits of order one, W x + s B (A x) against (W + s B A) x; native products add in another order as well."""
EIGHT_BITS = 0.03
"""Of the largest logit: inputs of every product rounded to 8 bits, in two layers."""
BLOCK = 4
PROMPTS = ([1, 2, 3, 4, 5], [6, 7, 8], [9] * 9, [10, 11, 12, 13])

needs_native = pytest.mark.skipif(native.isa() is None, reason=str(native.missing()))


def adapter(
    model: Llama, seed: int = 0, *, rank: int = 3, only: str = "", size: float = 0.3, dora: bool = False
) -> LoraAdapter:
    """Random factors for every matrix that can have them and whose name contains `only`; for DoRA with random magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, shape in shapes(model.config).items():
        module = model.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if only in name and isinstance(module, nn.Linear | nn.Embedding) and len(shape) == 2:
            a = size * torch.randn(rank, shape[1], generator=generator) * shape[1] ** -0.5
            factors[name] = Factors(a, torch.randn(shape[0], rank, generator=generator), alpha=2.0 * rank)
            if dora:
                embeds = name == "tok_embeddings.weight"
                usual = model.get_parameter(name).detach().norm(dim=0 if embeds else 1)
                noise = torch.randn(usual.shape, generator=generator)
                factors[name] = replace(factors[name], magnitude=usual * (1 + 0.2 * noise))
        elif only in name and len(shape) == 3 and not dora:
            a = size * torch.randn(shape[0], rank, shape[2], generator=generator) * shape[2] ** -0.5
            factors[name] = Factors(a, torch.randn(*shape[:2], rank, generator=generator), alpha=2.0 * rank)
    return LoraAdapter(factors, rank, 2.0 * rank)


def merged(model: Llama, change: LoraAdapter) -> Llama:
    """A copy with W + scale * B A; an embedding that is tied is changed for looking up alone, as PEFT does."""
    model = copy.deepcopy(model)
    if model.config.tie_embeddings and "tok_embeddings.weight" in change.factors:
        model.output.weight = nn.Parameter(model.output.weight.detach().clone())
    with torch.no_grad():
        for name in change.factors:
            weight = model.get_parameter(name)
            weight.copy_(change.merged(name, weight))
    return model


class Batches:
    """Prompts in a cache of their own, prefilled in two pieces, then a step: what an engine does."""

    def __init__(self, model: Llama, names: tuple[str | None, ...]) -> None:
        self.cache = PagedCache(model.config, blocks=40, block_size=BLOCK)
        self.sequences, self.blocks, first = [], [], 1
        for i, (prompt, name) in enumerate(zip(PROMPTS, names, strict=False)):
            self.sequences.append(Sequence(Request(str(i), tuple(prompt), SamplingParams(), adapter=name), 0, (i, 0)))
            self.blocks.append(list(range(first, first + 4)))
            first += 4

    def batch(self, pieces: list[tuple[int, int, int]]) -> RaggedBatch:
        """(sequence, start, stop); logits of every row."""
        chunks = [Chunk(self.sequences[i], a, b - a, True, b - a, self.blocks[i]) for i, a, b in pieces]
        return pack(StepPlan(chunks), BLOCK)

    def run(self, runner: Runner, *, together: bool = True) -> list[Tensor]:
        """Logits [S, V] of each whole prompt."""
        parts = [[(i, 0, 2), (i, 2, len(s.tokens))] for i, s in enumerate(self.sequences)]
        if together:
            steps = [[p[0] for p in parts], [p[1] for p in parts]]
        else:
            steps = [[piece] for p in parts for piece in p]
        out: list[list[Tensor]] = [[] for _ in self.sequences]
        for step in steps:
            logits = runner.logits(self.batch(step), self.cache).split([b - a for _, a, b in step])
            for (i, _, _), rows in zip(step, logits, strict=True):
                out[i].append(rows)
        return [torch.cat(rows) for rows in out]


def served(model: Llama, runner: Runner | None = None, *, deterministic: bool = False) -> AdapterRunner:
    """A runner with adapters one and two, of different matrices and ranks."""
    adapters = AdapterSet(model)
    adapters.load("one", adapter(model, 1))
    adapters.load("two", adapter(model, 2, rank=5, only="attention.w"))
    return AdapterRunner(runner or TorchRunner(model), adapters, deterministic=deterministic)


NAMES = (None, "one", "two", "one")


def plain(model: Llama, prompt: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt]))[0]


@pytest.mark.parametrize("kind", ["torch", "deterministic", "native"])
@pytest.mark.parametrize("name", TINY)
def test_rows_equal_the_merged_model(name: str, kind: str) -> None:
    """Rows without an adapter and of two adapters side by side, every generation, every runner."""
    model = build(name)
    if kind == "native" and native.isa() is None:
        pytest.skip(str(native.missing()))
    base = NativeRunner(model) if kind == "native" else None
    runner = served(model, base, deterministic=kind == "deterministic")
    found = Batches(model, NAMES).run(runner)
    models = {None: model, "one": merged(model, adapter(model, 1))}
    models["two"] = merged(model, adapter(model, 2, rank=5, only="attention.w"))
    for logits, prompt, chosen in zip(found, PROMPTS, NAMES, strict=True):
        expected = plain(models[chosen], prompt)
        assert (logits - expected).abs().max() <= MERGED * max(1, float(expected.abs().max()))
        if chosen is not None:
            assert (logits - plain(model, prompt)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["torch", "deterministic", "native"])
@pytest.mark.parametrize("name", ["llama-3", "llama-3.2"])
def test_dora_beside_lora_and_none(name: str, kind: str) -> None:
    if kind == "native" and native.isa() is None:
        pytest.skip(str(native.missing()))
    model = build(name)
    changes = {"one": adapter(model, 1, dora=True), "two": adapter(model, 2, rank=5, only="attention.w")}
    adapters = AdapterSet(model)
    for label, change in changes.items():
        assert adapters.load(label, change).matrices == len(change.factors)
    base = NativeRunner(model) if kind == "native" else TorchRunner(model)
    runner = AdapterRunner(base, adapters, deterministic=kind == "deterministic")
    models = {None: model} | {label: merged(model, change) for label, change in changes.items()}
    for logits, prompt, chosen in zip(Batches(model, NAMES).run(runner), PROMPTS, NAMES, strict=True):
        expected = plain(models[chosen], prompt)
        assert (logits - expected).abs().max() <= MERGED * max(1, float(expected.abs().max()))
    bare = {n: replace(p, magnitude=None) for n, p in changes["one"].factors.items()}
    without = merged(model, replace(changes["one"], factors=bare))
    assert (plain(without, PROMPTS[1]) - plain(models["one"], PROMPTS[1])).abs().max() > 0.01, "magnitudes matter"


def test_dora_on_a_quantized_base_is_measured_on_its_values() -> None:
    model = build(replace(TINY["llama-3"], hidden_dim=192))
    change = adapter(model, 1, dora=True, only="attention.w")
    quantize(model, "int8")
    expected = merged(dequantize(model), change)
    adapters = AdapterSet(model)
    adapters.load("one", change)
    found = Batches(model, ("one",) * 4).run(AdapterRunner(TorchRunner(model), adapters))
    for logits, prompt in zip(found, PROMPTS, strict=True):
        # Products with quantized weights round their inputs to 8 bits where native kernels run.
        assert (logits - plain(expected, prompt)).abs().max() <= EIGHT_BITS * float(logits.abs().max())


@pytest.mark.parametrize("name", ["llama-2", "llama-3.2", "llama-4-scout"])
def test_mixed_equals_one_by_one(name: str) -> None:
    """Bitwise, on the torch path that promises it: any company, any split."""
    model = build(name)
    together = Batches(model, NAMES).run(served(model, TiledRunner(model), deterministic=True))
    alone = Batches(model, NAMES).run(served(model, TiledRunner(model), deterministic=True), together=False)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["torch", "deterministic", "native"])
def test_the_base_notices_nothing(kind: str) -> None:
    """The same rows in the same batch, with adapters loaded or not, and with neighbours that use them: the same bits."""
    if kind == "native" and native.isa() is None:
        pytest.skip(str(native.missing()))
    model = build("llama-3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make = {"torch": TorchRunner, "deterministic": TiledRunner, "native": NativeRunner}[kind]
    expected = Batches(model, (None,) * 4).run(make(model))
    runner = served(model, make(model), deterministic=kind == "deterministic")
    assert all(map(torch.equal, Batches(model, (None,) * 4).run(runner), expected))
    found = Batches(model, NAMES).run(runner)
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, LoraLinear | LoraMoE) for module in model.modules())


@pytest.mark.parametrize("kind", ["torch", "deterministic"])
def test_experts_alone_beside_none_and_another(kind: str) -> None:
    """Two adapters of experts with other parts of them, in one step with rows that have none; the base is left as it was."""
    model = build("llama-4-maverick")
    changes = {"one": adapter(model, 1, only="experts.w"), "two": adapter(model, 2, rank=5, only="experts.w2")}
    adapters = AdapterSet(model)
    for label, change in changes.items():
        loaded = adapters.load(label, change)
        assert loaded.matrices == len(change.factors)
        expected = sum(float(change.delta(name).double().square().sum()) for name in change.factors) ** 0.5
        assert loaded.change == pytest.approx(expected, rel=1e-5)
    runner = AdapterRunner(TorchRunner(model), adapters, deterministic=kind == "deterministic")
    models = {None: model} | {label: merged(model, change) for label, change in changes.items()}
    for logits, prompt, chosen in zip(Batches(model, NAMES).run(runner), PROMPTS, NAMES, strict=True):
        expected_logits = plain(models[chosen], prompt)
        assert (logits - expected_logits).abs().max() <= MERGED * max(1, float(expected_logits.abs().max()))
        assert chosen is None or (logits - plain(model, prompt)).abs().max() > 0.01
    assert not any(isinstance(module, LoraMoE) for module in model.modules())
    adapters.unload("one")
    assert adapters.names == ("two",)


def test_experts_beside_quantized_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, which would round inputs to 8 bits."""
    monkeypatch.setattr(native, "isa", lambda: None)
    model = build(EXPERTS)
    change = adapter(model, 1, only="experts.w")
    quantize(model, "int8")
    expected = merged(dequantize(model), change)
    adapters = AdapterSet(model)
    adapters.load("one", change)
    runner = AdapterRunner(TorchRunner(model), adapters)
    for logits, prompt in zip(Batches(model, ("one",) * 4).run(runner), PROMPTS, strict=True):
        assert (logits - plain(expected, prompt)).abs().max() <= MERGED * float(logits.abs().max())
        assert (logits - plain(dequantize(model), prompt)).abs().max() > 0.01


@needs_native
def test_beside_quantized_weights() -> None:
    """A quantized base keeps its panels: the change is added to what they give. Base rows stay native, to the bit."""
    model = build(replace(TINY["llama-3"], hidden_dim=192))
    quantize(model, "int8")
    base = runner_for(model)
    assert isinstance(base, NativeRunner)
    adapters = AdapterSet(model)
    change = adapter(build(model.config), 1)
    adapters.load("one", change)
    runner = AdapterRunner(base, adapters)
    expected = Batches(model, (None,) * 4).run(base)
    found = Batches(model, NAMES[:2]).run(AdapterRunner(base, adapters))
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() > 0.01
    alone = Batches(model, (None, "one"))
    again = alone.run(runner, together=False)
    assert torch.equal(again[1], found[1])  # native products and attention by span: the same bits in any company


def test_none_for_a_matrix_it_does_not_change() -> None:
    model = build("llama-3")
    adapters = AdapterSet(model)
    adapters.load("one", adapter(model, 1, only="layers.1.attention.wq"))
    assert adapters.model is not None
    wrapped = [name for name, module in adapters.model.named_modules() if isinstance(module, LoraLinear)]
    assert wrapped == ["layers.1.attention.wq"]
    found = Batches(model, ("one",)).run(AdapterRunner(TorchRunner(model), adapters))[0]
    expected = plain(merged(model, adapter(model, 1, only="layers.1.attention.wq")), PROMPTS[0])
    assert (found - expected).abs().max() <= MERGED


def test_unload_and_load_again() -> None:
    model = build("llama-3")
    runner = served(model)
    adapters = runner.adapters
    first = Batches(model, NAMES).run(runner)
    adapters.unload("one")
    assert adapters.names == ("two",)
    with pytest.raises(ConfigError, match=r"no adapter 'one': loaded are two"):
        Batches(model, NAMES).run(runner)
    assert torch.equal(Batches(model, (None, None, "two", None)).run(runner)[2], first[2])
    adapters.load("one", adapter(model, 7))
    other = Batches(model, NAMES).run(runner)[1]
    assert (other - plain(merged(model, adapter(model, 7)), PROMPTS[1])).abs().max() <= MERGED * 10
    with pytest.raises(ConfigError, match="loaded already"):
        adapters.load("one", adapter(model, 1))
    with pytest.raises(ConfigError, match="no adapter 'three'"):
        adapters.unload("three")


@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_from_files(kind: str, tmp_path: Path) -> None:
    """What is told of it, and the norm of its change."""
    model = build("llama-3")
    change = adapter(model, 1, only="layers")
    place = tmp_path / ("lora.gguf" if kind == "gguf" else "lora")
    if kind == "peft":
        place.mkdir()
        write_peft(change, place, model.config, lambda _: None)
    else:
        write_gguf_lora(change, place, model.config, lambda _: None)
    adapters = AdapterSet(model)
    loaded = adapters.load("one", place)
    assert (loaded.rank, loaded.matrices) == (3, 14)
    expected = sum(float(change.delta(name).double().square().sum()) for name in change.factors) ** 0.5
    assert loaded.change == pytest.approx(expected, rel=1e-5)
    found = Batches(model, ("one",)).run(AdapterRunner(TorchRunner(model), adapters))[0]
    assert (found - plain(merged(model, change), PROMPTS[0])).abs().max() <= MERGED * 10


def test_an_adapter_that_changes_nothing_says_so() -> None:
    model = build("llama-3")
    change = adapter(model, 1, only="wq")
    zero = LoraAdapter({name: replace(pair, b=pair.b * 0) for name, pair in change.factors.items()}, 3, 6.0)
    assert AdapterSet(model).load("untrained", zero).change == 0


def bad(kind: str, model: Llama) -> LoraAdapter:
    good = adapter(model, 1, only="wq")
    name, pair = next(iter(good.factors.items()))
    weight = model.norm.weight.detach()
    match kind:
        case "another base":
            return adapter(build("llama-4-scout"), 1, only="wq")
        case "other layers":
            return LoraAdapter({"layers.7.attention.wq.weight": pair}, 3, 6.0)
        case "whole":
            return LoraAdapter(good.factors, 3, 6.0, whole={"norm.weight": weight})
        case "infinite":
            return LoraAdapter({name: replace(pair, a=pair.a / 0)}, 3, 6.0)
        case "empty":
            return LoraAdapter({}, 3, 6.0)
        case "integers":
            return LoraAdapter({name: replace(pair, a=pair.a.to(torch.int8))}, 3, 6.0)
        case "rank":
            wide = Factors(torch.zeros(1025, pair.a.shape[1]), torch.zeros(pair.b.shape[0], 1025), 1.0)
            return LoraAdapter({name: wide}, 1025, 1.0)
    raise AssertionError


REASONS = {
    "another base": "changes a matrix of shape .* the base model has",
    "other layers": "the base model has no such parameter",
    "whole": r"replaces whole weights \(norm.weight\)",
    "infinite": "not finite",
    "empty": "changes nothing",
    "integers": "int8: expected floats",
    "rank": "rank 1025, and at most 1024",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_wrong_adapter_is_refused_with_the_reason(kind: str) -> None:
    model = build("llama-3")
    adapters = AdapterSet(model)
    with pytest.raises((CheckpointError, ConfigError), match=REASONS[kind]):
        adapters.load("one", bad(kind, model))
    assert adapters.names == ()
    assert adapters.model is None


def test_nothing_there(tmp_path: Path) -> None:
    adapters = AdapterSet(build("llama-3"))
    with pytest.raises(CheckpointError, match="no such adapter"):
        adapters.load("one", tmp_path / "missing")
    with pytest.raises(CheckpointError, match="is no adapter"):
        adapters.load("one", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    with pytest.raises(CheckpointError, match=r"neither adapter_model.safetensors"):
        adapters.load("one", tmp_path)
    with pytest.raises(ConfigError, match="needs a name"):
        adapters.load("", tmp_path)


def engine(model: Llama, **config: object) -> Engine:
    config = {"blocks": 64, "block_size": BLOCK, "max_len": 60, "max_seqs": 8, "debug": True, **config}
    return Engine(model, EngineConfig(**config))  # type: ignore[arg-type]


def replies(made: Engine, *asked: Request) -> list[list[int]]:
    for request in asked:
        made.add(request)
    out: dict[str, list[int]] = {request.id: [] for request in asked}
    while made.busy:
        for event in made.step():
            assert event.error is None
            if event.token is not None:
                out[event.request_id].append(event.token)
    return list(out.values())


def request(
    name: str, adapter: str | None, prompt: tuple[int, ...] = tuple(range(20, 40)), **params: object
) -> Request:
    params = {"max_tokens": 12, "temperature": 0, "seed": 1, **params}
    return Request(name, prompt, SamplingParams(**params), adapter=adapter)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama-3.2", "llama-4-scout"])
def test_requests_choose_an_adapter(name: str) -> None:
    """Greedy replies of an engine are those of engines over the merged models; several adapters run in one step."""
    model = build(name)
    made = engine(model)
    made.load_adapter("one", adapter(model, 1))
    made.load_adapter("two", adapter(model, 2, rank=5, only="attention.w"))
    found = replies(made, request("a", None), request("b", "one"), request("c", "two"), request("d", "one"))
    expected = [
        replies(engine(one), request("x", None))[0]
        for one in (
            model,
            merged(model, adapter(model, 1)),
            merged(model, adapter(model, 2, rank=5, only="attention.w")),
        )
    ]
    assert found == [expected[0], expected[1], expected[2], expected[1]]
    assert len({tuple(tokens) for tokens in found}) == 3


def test_the_same_bits_alone_and_in_company() -> None:
    """What deterministic promises, with adapters: tokens and log-probabilities, also with a prefix from the cache."""
    model = build("llama-3")

    def told(*asked: Request) -> dict[str, list[tuple[object, ...]]]:
        made = engine(model, deterministic=True)
        made.load_adapter("one", adapter(model, 1))
        made.load_adapter("two", adapter(model, 2))
        out: dict[str, list[tuple[object, ...]]] = {}
        for first in (asked[:1], asked[1:]):
            for one in first:
                made.add(one)
            while made.busy:
                for event in made.step():
                    out.setdefault(event.request_id, []).append((event.token, event.logprob))
        return out

    asked = [
        request(str(i), name, tuple(range(20, 40 - i)), temperature=0.8, logprobs=1)
        for i, name in enumerate(("one", None, "two", "one"))
    ]
    together = told(*asked)
    for one in asked:
        assert told(one)[one.id] == together[one.id]


def test_prefixes_are_kept_apart() -> None:
    model = build("llama-3")
    made = engine(model)
    made.load_adapter("one", adapter(model, 1))
    made.load_adapter("two", adapter(model, 2))

    def cached(name: str | None) -> int:
        made.add(request("x", name))
        return [event.cached_tokens for _ in iter(lambda: made.busy, False) for event in made.step()][-1]

    assert [cached(name) for name in ("one", "two", None)] == [0, 0, 0]
    assert [cached(name) for name in ("one", "two", None)] == [16, 16, 16]
    made.unload_adapter("one")
    made.load_adapter("one", adapter(model, 3))
    assert [cached(name) for name in ("one", "two", None)] == [0, 16, 16]


def test_unknown_and_busy_adapters() -> None:
    model = build("llama-3")
    made = engine(model)
    with pytest.raises(ConfigError, match="no adapter 'one': loaded are none"):
        made.add(request("x", "one"))
    made.load_adapter("one", adapter(model, 1))
    made.add(request("x", "one"))
    with pytest.raises(ConfigError, match="adapter 'one' has 1 unfinished requests"):
        made.unload_adapter("one")
    made.step()
    made.abort("x")
    made.step()
    made.unload_adapter("one")
    with pytest.raises(ConfigError, match="loaded are none"):
        made.add(request("y", "one"))


def test_guesses_are_checked_with_the_adapter() -> None:
    """Speculation and adapters together: a draft model without the adapter guesses, the replies are the same."""
    model = build("llama-3")
    asked = [request("a", "one"), request("b", None), request("c", "one", (1, 2, 1, 2, 1))]
    out = []
    for drafter in (None, NgramDrafter(4, shortest=1), ModelDrafter(model)):
        made = engine(model)
        if drafter is not None:
            made.speculation = Speculation(drafter, model.config, pace=Pace(4, always=True))
        made.load_adapter("one", adapter(model, 1))
        out.append(replies(made, *asked))
    assert out[0] == out[1] == out[2]
