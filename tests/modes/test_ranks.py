"""A model over two processes gives what it gives alone: every generation, any split, prefix hits, preemption, drafts, forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from herd.checkpoint.open import open_store
from herd.engine.config import EngineConfig
from herd.engine.cuda_runner import CudaRunner
from herd.engine.ranks import Ranks, RanksRunner
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.quant.apply import dequantize, quantize
from herd.quant.fp8 import encode_fp8
from tests.build import TINY, fill, tiny
from tests.checkpoint.folders import write_meta
from tests.modes.test_modes import LENGTH, MODES_BOUND, TABLE
from tests.modes.test_paged import INT8_BOUND, Rounded, run, texts
from tests.quant.wide import wide

Measured = Callable[[str, str, float], None]

ROUNDED = 0.1
"""Activations are rounded to 8 bits before each product: a sum in another order moves some over a rounding step. One rank
alone differs by 0.058 from its own full forward then (torch's attention, another split); the rounding itself moves logits by
0.08."""
HALVES = 6e-2
"""Each rank rounds its summand to bfloat16 (2^-8) before they are added; logits are of order one."""


def shared(name: str) -> ModelConfig:
    """`tiny(name)` with heads that two ranks can share; Scout's groups of five stay groups of five."""
    config = tiny(name)
    return config if config.n_heads % 2 == 0 else replace(config, n_heads=10, n_kv_heads=2)


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """One other process for all cases: starting one takes seconds."""
    with Ranks(2) as ranks:
        yield ranks


def made(config: ModelConfig, folder: Path) -> Llama:
    """A whole model with random weights, and its files in `folder`."""
    model = fill(Llama(config)).eval().requires_grad_(False)
    write_meta(folder, model)
    return model


def alone(model: Llama, name: str, rounded: bool = False) -> list[Tensor]:
    see = [Rounded()] * model.config.n_layers if rounded else None
    with torch.no_grad():
        return [model(torch.tensor([ids]), None, see)[0].float() for ids in texts(name)]


def over(
    ranks: Ranks, folder: Path, weights: str = "auto", dtype: torch.dtype = torch.float32, deterministic: bool = False
) -> tuple[Llama, RanksRunner]:
    """The model in `folder` over the ranks, and what runs it."""
    model = ranks.load(folder, open_store(folder), None if weights != "auto" else dtype, weights=weights)
    return model, ranks.runner(
        model, EngineConfig(blocks=64, max_len=LENGTH + 4, graphs=False, deterministic=deterministic)
    )


@pytest.mark.parametrize("name", TINY)
def test_two_ranks(name: str, pair: Ranks, tmp_path: Path, measured: Measured) -> None:
    expected = alone(made(shared(name), tmp_path), name)
    model, runner = over(pair, tmp_path)
    assert model.config.n_heads == shared(name).n_heads // 2
    seen = run(name, expected, model=model, runner=runner, cache=runner.cache, late=True, seed=4, spare=3)
    measured(TABLE, f"{name}, two ranks", seen.worst)
    assert seen.worst <= MODES_BOUND
    assert seen.cached
    assert seen.preempted
    assert seen.drafted


def test_key_heads_that_both_ranks_hold(pair: Ranks, tmp_path: Path) -> None:
    """One key/value head for two ranks, and a vocabulary with an odd number of rows, tied."""
    config = replace(tiny("llama-2-70b"), vocab_size=319, tie_embeddings=True)
    expected = alone(made(config, tmp_path), "llama-1")
    model, runner = over(pair, tmp_path)
    assert (model.config.n_kv_heads, model.config.vocab_size) == (1, 319)
    assert (
        run("llama-1", expected, model=model, runner=runner, cache=runner.cache, late=True, seed=2).worst <= MODES_BOUND
    )


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama-3", "int8"),
        pytest.param("llama-3", "int4", marks=pytest.mark.slow),
        pytest.param("llama-4-scout", "int8", marks=pytest.mark.slow),
        pytest.param("llama-3", "nf4", marks=pytest.mark.slow),
    ],
)
def test_quantized(name: str, weights: str, pair: Ranks, tmp_path: Path) -> None:
    """Each rank quantizes its part: the same blocks as of the whole."""
    whole = made(wide(name), tmp_path)
    assert quantize(whole, weights) == []
    model, runner = over(pair, tmp_path, weights)
    assert (
        run(name, alone(whole, name), model=model, runner=runner, cache=runner.cache, late=True, seed=3).worst
        <= ROUNDED
    )


def test_int8_keys_and_values(pair: Ranks, tmp_path: Path) -> None:
    name = "llama-3"
    expected = alone(made(tiny(name), tmp_path), name, rounded=True)
    model, runner = over(pair, tmp_path)
    seen = run(name, expected, model=model, runner=runner, cache=runner.cache, late=True, dtype=torch.int8)
    assert seen.worst <= INT8_BOUND


def test_tiles_and_bfloat16(pair: Ranks, tmp_path: Path) -> None:
    """The deterministic runner on both ranks; sums in a 16-bit type."""
    name = "llama-3.2"
    whole = made(tiny(name), tmp_path)
    expected = alone(whole.to(torch.bfloat16), name)
    model, runner = over(pair, tmp_path, dtype=torch.bfloat16, deterministic=True)
    seen = run(name, expected, model=model, runner=runner, cache=runner.cache, late=True, dtype=torch.bfloat16)
    assert seen.worst <= HALVES


@pytest.mark.parametrize("name", [pytest.param("llama-3", marks=pytest.mark.slow), "llama-4-scout"])
def test_what_gpus_run(name: str, pair: Ranks, tmp_path: Path) -> None:
    """Rank 0 with the runtime of GPUs, on a CPU: fused products, the same exchanges."""
    expected = alone(made(shared(name), tmp_path), name)
    model, runner = over(pair, tmp_path)
    runner.own = CudaRunner(model, max_seqs=4, max_len=LENGTH + 4, graphs=False)
    assert run(name, expected, model=model, runner=runner, cache=runner.cache, late=True, seed=6).worst <= MODES_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3", "llama-2"])
def test_four_ranks(name: str, tmp_path: Path) -> None:
    """Two key/value heads for four ranks, and four."""
    expected = alone(made(tiny(name), tmp_path), name)
    with Ranks(4) as ranks:
        model, runner = over(ranks, tmp_path)
        assert run(name, expected, model=model, runner=runner, cache=runner.cache, late=True).worst <= MODES_BOUND


@pytest.mark.slow
def test_fp8_has_scales_of_parts(pair: Ranks, tmp_path: Path) -> None:
    """A row that is cut has a scale on each rank: what a model gives whose halves were rounded one by one."""
    name = "llama-3.2"
    whole = made(wide(name), tmp_path)
    rounded = [
        [torch.cat([_fp8(half) for half in linear.weight.chunk(2, 1)], 1) for linear in _cut_by_columns(layer)]
        for layer in whole.layers
    ]
    assert quantize(whole, "fp8") == []
    twin = dequantize(whole)
    for layer, weights in zip(twin.layers, rounded, strict=True):
        for linear, weight in zip(_cut_by_columns(layer), weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
    model, runner = over(pair, tmp_path, "fp8")
    seen = run(name, alone(twin, name), model=model, runner=runner, cache=runner.cache, late=True, seed=3)
    assert seen.worst <= MODES_BOUND


def _cut_by_columns(layer: Any) -> tuple[nn.Linear, nn.Linear]:
    return layer.attention.wo, layer.feed_forward.w2


def _fp8(weight: Tensor) -> Tensor:
    stored = encode_fp8(weight)
    return stored.weight.float() * stored.scale.view(-1, 1)
