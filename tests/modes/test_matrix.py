"""Every generation through every path: the table of which test holds which pair, and the pairs that no other module has.

A new generation has to name a tiny twin here and then runs through everything; a new runner, drafter, kind of weights or cache
has to name the test that runs it with every generation.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

import herd.engine
from herd.adapters.prefix import Prefix, PrefixTuned, Prompt, PromptTuned, Virtual
from herd.engine.adapters import OneAdapter
from herd.engine.cuda_runner import CudaRunner
from herd.engine.native import NativeRunner, runner_for
from herd.engine.paged import KV_DTYPES
from herd.engine.runner import Runner, TorchRunner
from herd.engine.tiles import TiledRunner
from herd.engine.virtual import virtual_tokens
from herd.errors import ConfigError
from herd.kernels import native
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.model.presets import RELEASES
from herd.quant.apply import WEIGHTS, dequantize, quantize
from tests.build import DENSE, LLAMA4, TINY, build, tiny
from tests.engine import test_adapters, test_engine, test_speculation
from tests.engine.tape import Tape
from tests.modes import test_compiled, test_cuda, test_formats, test_modes, test_native, test_paged, test_ranks
from tests.modes.pairs import pairs
from tests.modes.test_modes import LENGTH, MODES_BOUND, TABLE
from tests.modes.test_paged import run, texts, whole
from tests.quant.wide import wide

Measured = Callable[[str, str, float], None]

FLIPS = 0.03
"""Where only the output matrix is native: a sum in another order moves an activation over a rounding step of its 8 bits now and
then, by 1/127 of the largest of 128; 7e-3 was seen, and logits are of order one."""

TWINS: dict[str, tuple[str, ...]] = {
    "1": ("llama-1",),
    "2": ("llama-2", "llama-2-70b"),
    "code": ("code-llama", "llama-2-70b"),
    "3": ("llama-3",),
    "3.1": ("llama-3.1",),
    "3.2": ("llama-3.2",),
    "3.3": ("llama-3.1",),
    "4": ("llama-4-scout", "llama-4-maverick"),
    "guard-1": ("llama-2",),
    "guard-2": ("llama-3",),
    "guard-3": ("llama-3.1", "llama-3.2"),
    "guard-4": ("llama-guard-4",),
}
"""Generation of the catalog -> the tiny models that have everything its models differ in."""
UNRELEASED = {"llama-4-top-2"}
"""What a Llama 4 could be."""

PATHS: dict[str, Callable[..., None]] = {
    "step by step": test_modes.test_step_by_step,
    "prompt in pieces": test_modes.test_any_split_of_the_prompt,
    "packed documents": test_modes.test_packed_documents_equal_separate_ones,
    "compiled": test_compiled.test_decode_step_compiles_once,
    "from files": test_formats.test_loaded_equals_built,
    "paged, prefix hits, drafts": test_paged.test_any_mix_equals_the_full_forward,
    "preemption": test_paged.test_after_preemption,
    "int8 cache": test_paged.test_int8_cache,
    "native": test_native.test_plain_weights,
    "native, in any company": test_native.test_plain_weights_in_any_company,
    "native, long steps in torch": test_native.test_steps_of_many_rows_through_torch,
    "native, quantized": test_native.test_quantized_weights,
    "GPU runtime": test_cuda.test_any_mix_equals_the_full_forward,
    "GPU runtime, recorded": test_cuda.test_recorded_steps_equal_the_full_forward,
    "GPU runtime, its kernels": test_cuda.test_calls_of_the_kernels,
    "GPU runtime, int8 cache": test_cuda.test_int8_cache,
    "two ranks": test_ranks.test_two_ranks,
    "engine": test_engine.test_the_tokens_are_those_of_the_naive_loop,
    "speculative": test_speculation.test_greedy_is_the_same_token_for_token,
    "LoRA, several in one batch": test_adapters.test_rows_equal_the_merged_model,
}
"""Path -> the test that takes every generation through it; those of this module are added below."""

RUNNERS = {
    "TorchRunner": "paged, prefix hits, drafts",
    "NativeRunner": "native",
    "StepwiseRunner": "native, long steps in torch",
    "TiledRunner": "tiles",
    "CudaRunner": "GPU runtime",
    "RanksRunner": "two ranks",
    "AdapterRunner": "LoRA, several in one batch",
    "OneAdapter": "LoRA, one",
}
DRAFTERS = {"NgramDrafter": "prompt lookup", "ModelDrafter": "other model"}
CACHES = {
    torch.float32: "paged, prefix hits, drafts",
    torch.int8: "int8 cache",
    torch.bfloat16: "16-bit cache",
    torch.float16: "16-bit cache",
}


def here(path: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of this module is that of `path`."""

    def enter(test: Callable[..., None]) -> Callable[..., None]:
        PATHS[path] = test
        return test

    return enter


QUANTIZED = [
    *pairs(DENSE, WEIGHTS),
    *pairs(["llama-4-maverick", "llama-guard-4", "llama-4-scout", "llama-4-top-2"], WEIGHTS),
]
"""Every generation with every kind of weights: in the quick run each kind in a dense model and in a Llama 4."""


@here("quantized, in any company")
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(("name", "weights"), QUANTIZED)
def test_every_kind_of_weights(name: str, weights: str, measured: Measured) -> None:
    """Paged, in pieces, with prefix hits, preempted and with drafts: bitwise the rows of one native step; in torch, those of
    the same modules in a plain forward."""
    model = build(wide(name))
    assert quantize(model, weights) == []
    runner = runner_for(model)
    if isinstance(runner, NativeRunner):
        expected, bound = test_native.alone(model, name), 0.0
    else:
        expected, bound = test_native.forward(model, name), FLIPS if weights == "nf4" else MODES_BOUND
    seen = run(name, expected, model=model, runner=runner, seed=4, spare=3)
    measured(TABLE, f"{name}, {weights}", seen.worst)
    assert seen.worst <= bound
    assert seen.cached
    assert seen.preempted
    assert seen.drafted


ON_A_GPU = pairs(
    [
        "llama-4-scout", "llama-4-top-2", "llama-guard-4", "llama-1", "llama-2", "llama-2-70b", "code-llama",
        "llama-4-maverick", "llama-3", "llama-3.1", "llama-3.2",
    ],
    [kind for kind in WEIGHTS if kind != "w8a8"],  # torch's definition of it, tested with kernels of its own
)  # fmt: skip


@here("GPU runtime, quantized")
@pytest.mark.parametrize(("name", "weights"), ON_A_GPU)
def test_quantized_on_a_gpu(name: str, weights: str, monkeypatch: pytest.MonkeyPatch, measured: Measured) -> None:
    """Blocks as they are on a GPU (no panels of the CPU's library): what the dequantized twin gives."""
    monkeypatch.setattr(native, "isa", lambda: None)
    model = build(wide(name))
    assert quantize(model, weights) == []
    twin, tape = dequantize(model), Tape()
    with torch.no_grad():
        expected = [twin(torch.tensor([ids]))[0] for ids in texts(name)]
    runner = CudaRunner(model, max_seqs=4, max_len=LENGTH + 4, capture=tape)
    seen = run(name, expected, model=model, runner=runner, drafts=False, scratch=True, late=True)
    measured(TABLE, f"{name}, GPU runtime, {weights}", seen.worst)
    assert seen.worst <= MODES_BOUND
    layers = [m for module in model.modules() for m in getattr(module, "matrices", tuple)()]
    kept = [m for m in layers if m.blocks is not None]
    # What stays in blocks is an embedding that is only looked up in.
    assert len(kept) == (0 if model.config.tie_embeddings or weights == "fp8" else 1)
    assert bool(tape.made) == (model.config.moe is None)  # quantized experts ask how many rows each has


@here("tiles")
@pytest.mark.parametrize("name", TINY)
def test_tiles(name: str, measured: Measured) -> None:
    """The deterministic path where there is no library."""
    model = build(name)
    seen = run(name, whole(name), model=model, runner=TiledRunner(model), seed=11)
    measured(TABLE, f"{name}, tiles", seen.worst)
    assert seen.worst <= MODES_BOUND
    assert seen.cached


@here("LoRA, one")
@pytest.mark.parametrize("name", TINY)
def test_one_adapter(name: str) -> None:
    """Every row with it, through everything a scheduler does: what the merged model gives."""
    model, change = build(name), test_adapters.adapter(build(name), 1)
    merged = test_adapters.merged(model, change)
    with torch.no_grad():
        expected = [merged(torch.tensor([ids]))[0] for ids in texts(name)]
    seen = run(name, expected, model=model, runner=OneAdapter(model, change), seed=4, spare=3)
    assert seen.worst <= test_adapters.MERGED * max(1, *(float(rows.abs().max()) for rows in expected))
    assert max(float((a - b).abs().max()) for a, b in zip(expected, whole(name), strict=True)) > 0.01
    assert seen.preempted


def tuned(name: str, kind: str, count: int) -> Virtual:
    """Random virtual tokens of order one for a tiny model."""
    config, generator = tiny(name), torch.Generator().manual_seed(count)
    if kind == "prompt":
        return Prompt(torch.randn(count, config.dim, generator=generator))
    shape = config.n_layers, count, config.n_kv_heads, config.head_dim
    return Prefix(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


BEHIND: dict[int, Callable[[Llama], Runner]] = {5: runner_for, 8: TorchRunner, 19: TiledRunner}
"""How many virtual tokens, and what runs the texts behind them."""


@here("prefix and prompt tuning")
@pytest.mark.parametrize(("name", "way"), pairs(TINY, product(["prefix", "prompt"], BEHIND)))
def test_virtual_tokens(name: str, way: tuple[str, int], measured: Measured) -> None:
    """Texts behind virtual tokens beside plain ones, through everything a scheduler does: what the model gives that trains them.
    Llama 4 loses sight of them behind its first chunk, and refuses them."""
    model, (kind, count) = build(name), way
    adapter = tuned(name, kind, count)
    if name in LLAMA4:
        with pytest.raises(ConfigError, match="for Llama 1 to 3"):
            virtual_tokens(model, adapter)
        return
    trained = PrefixTuned(build(name), adapter) if isinstance(adapter, Prefix) else PromptTuned(build(name), adapter)
    with torch.no_grad():
        expected = [trained(torch.tensor([ids]))[0] for ids in texts(name)]
    assert max(float((a - b).abs().max()) for a, b in zip(expected, whole(name), strict=True)) > 0.01
    expected[2::3] = whole(name)[2::3]
    runner, virtual = BEHIND[count](model), virtual_tokens(model, adapter)
    seen = run(name, expected, model=model, runner=runner, seed=count, spare=5, virtual=virtual)
    measured(TABLE, f"{name}, behind a {kind} of {count}", seen.worst)
    assert seen.worst <= MODES_BOUND
    assert seen.preempted
    assert seen.drafted


@here("16-bit cache")
@pytest.mark.parametrize(("name", "kv"), pairs(TINY, [torch.bfloat16, torch.float16]))
def test_16_bit_caches(name: str, kv: torch.dtype) -> None:
    """Keys and values rounded once, whatever runs beside them: bitwise the rows of a step alone."""
    if native.isa() is None:
        pytest.skip(f"no native kernels: {native.missing()}")
    model = build(name)
    expected = test_native.alone(model, name, kv)
    assert run(name, expected, model=model, runner=NativeRunner(model), seed=13, dtype=kv).worst == 0


def _taken(test: Callable[..., None]) -> set[str]:
    """The generations that a test is parametrized with, and that the quick run takes."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for mark in marks:
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
        if "name" in (names := [name.strip() for name in names]):
            at, found = names.index("name"), set()
            for value in mark.args[1]:
                given = value.values if hasattr(value, "marks") else value if len(names) > 1 else (value,)
                if not any(mark.name in ("slow", "gpu") for mark in getattr(value, "marks", ())):
                    found.add(given[at])
            return found
    return set()


@pytest.mark.parametrize("path", PATHS)
def test_a_path_takes_every_generation(path: str) -> None:
    missing = TINY.keys() - _taken(PATHS[path])
    assert not missing, f"{path}: {PATHS[path].__module__} runs it without {sorted(missing)}"
    assert not any(mark.name in ("slow", "gpu", "skip") for mark in getattr(PATHS[path], "pytestmark", []))


def _traits(config: ModelConfig) -> tuple[Any, ...]:
    """What code looks at: everything but sizes."""
    layers = frozenset((layer.placement, layer.chunk is not None, layer.moe) for layer in config.layers)
    shared = config.n_kv_heads < config.n_heads
    return shared, config.rope_scaling is not None, config.tie_embeddings, config.temper is not None, layers


def test_every_release_has_a_tiny_twin() -> None:
    for release in RELEASES:
        if release.config is not None and release.runnable:
            assert release.generation in TWINS, f"{release.id}: say which tiny models stand for its generation"
            twins = {_traits(tiny(name)) for name in TWINS[release.generation]}
            assert _traits(release.config) in twins, f"{release.id} differs from {TWINS[release.generation]}"
    assert {name for names in TWINS.values() for name in names} == TINY.keys() - UNRELEASED
    assert TWINS.keys() == {release.generation for release in RELEASES if release.config and release.runnable}
    assert _traits(replace(tiny("llama-2"), tie_embeddings=True)) not in map(_traits, TINY.values())


def _classes(*methods: str) -> set[str]:
    """Names of the classes of `herd.engine` that have these methods of their own; protocols are none."""
    found = set()
    for module in pkgutil.iter_modules(herd.engine.__path__, "herd.engine."):
        for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            own = kind.__module__ == module.name and not getattr(kind, "_is_protocol", False)
            if own and all(callable(kind.__dict__.get(method)) for method in methods):
                found.add(name)
    return found


def test_every_way_of_computing_has_a_path() -> None:
    runners = {name for name in _classes("logits") if "batch" in _parameters(name, "logits")}
    assert runners == RUNNERS.keys()
    assert set(RUNNERS.values()) | set(CACHES.values()) <= PATHS.keys()
    assert _classes("draft", "forget", "check") == DRAFTERS.keys()
    assert set(DRAFTERS.values()) <= test_speculation.KINDS.keys()
    assert set(KV_DTYPES) == CACHES.keys()
    assert {pair.values for pair in QUANTIZED} == {(name, weights) for name in TINY for weights in WEIGHTS}


def _parameters(kind: str, method: str) -> set[str]:
    for module in pkgutil.iter_modules(herd.engine.__path__, "herd.engine."):
        found = getattr(importlib.import_module(module.name), kind, None)
        if found is not None:
            return set(inspect.signature(getattr(found, method)).parameters)
    return set()
