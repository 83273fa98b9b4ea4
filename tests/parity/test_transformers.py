"""Logits equal those of transformers, in fp32 and within a bound in bf16, for every generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from herd.model.config import LayerSpec, ModelConfig, RopeScaling, Temper, irope
from herd.model.llama import Llama
from tests.build import DENSE, LLAMA4, TINY, build, tiny, tokens
from tests.parity.oracles import hf_dense, hf_llama4, hf_logits

Measured = Callable[[str, str, float], None]

FP32_BOUND = 1e-5
"""Logits are of order one (at most 6 here). Both sides round every operation to 2^-24 relative, in different orders of
summation (fused attention, grouped experts); about 100 roundings lie on the longest path. The real error is a third of it."""

TABLE = "fp32 logits against transformers, max abs difference"


def oracle(model: Llama):
    """transformers' model of the same generation with the same weights."""
    llama4 = model.config.temper is not None
    return hf_llama4(model) if llama4 else hf_dense(model)


def difference(model: Llama, hf, ids: Tensor, positions: Tensor | None = None) -> float:
    """Largest difference of any logit."""
    with torch.no_grad():
        ours = model(ids, positions)
    assert ours.abs().max() > 1  # equal because it works, not because everything is zero
    return float((ours - hf_logits(hf, ids, positions)).abs().max())


@pytest.mark.parametrize("name", TINY)
def test_logits_equal(name: str, measured: Measured) -> None:
    model = build(name)
    hf = oracle(model)
    for length in (1, 2, 7, 100):
        worst = difference(model, hf, tokens(model.config, length, batch=2))
        measured(TABLE, name, worst)
        assert worst <= FP32_BOUND, f"{length} tokens"


@pytest.mark.parametrize("name", DENSE)
def test_far_positions(name: str, measured: Measured) -> None:
    """Gaps between positions reach past 8,192 and over the whole 131,072, so every wavelength matters."""
    model = build(name)
    positions = torch.tensor([0, 1, 3, 17, 130, 1024, 2047, 4100, 8191, 8192, 8193, 9000, 20_000, 65_536, 131_071])
    worst = difference(model, oracle(model), tokens(model.config, len(positions), batch=2), positions)
    measured(TABLE, f"{name}, positions to 131,071", worst)
    assert worst <= FP32_BOUND


def test_heads_wider_than_the_model() -> None:
    """head_dim is a number of its own, not dim / n_heads."""
    model = build(replace(tiny("llama-3"), head_dim=32))
    assert difference(model, hf_dense(model), tokens(model.config, 20)) <= FP32_BOUND


@pytest.mark.parametrize("name", [name for name in LLAMA4 if tiny(name).layers[0].chunk])
@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 70])
def test_chunked_attention(name: str, length: int, measured: Measured) -> None:
    """Around one chunk (16), around two, and over several: also across many steps of the temperature (8)."""
    model = build(name)
    worst = difference(model, hf_llama4(model), tokens(model.config, length, batch=2))
    measured(TABLE, f"{name}, chunk borders", worst)
    assert worst <= FP32_BOUND


def test_real_chunk_and_temperature(measured: Measured) -> None:
    """Llama 4's own sizes: chunks of 8,192 and a temperature that first rises at position 8,191."""
    layers = irope(2, nope=[1], chunk=8192)
    config = replace(tiny("llama-guard-4"), dim=16, n_heads=1, head_dim=16, layers=layers, temper=Temper())
    model = build(config)
    worst = difference(model, hf_llama4(model, "sdpa"), tokens(config, 8192 + 60))
    measured(TABLE, "llama-4, 8,252 tokens, chunk 8,192", worst)
    assert worst <= FP32_BOUND


def test_some_layers_without_temperature() -> None:
    """attn_temperature_tuning off: position-free layers keep their queries as they are."""
    layers = irope(4, chunk=16, moe_layers=range(4), temper=False)
    model = build(replace(tiny("llama-4-scout"), layers=layers, temper=None))
    assert difference(model, hf_llama4(model), tokens(model.config, 40)) <= FP32_BOUND


def _without(config: ModelConfig, **change: object) -> ModelConfig:
    return replace(config, layers=tuple(replace(spec, **change) for spec in config.layers))


def _positioned(config: ModelConfig) -> ModelConfig:
    return replace(
        config, layers=tuple(replace(s, placement="rope_norm") if s.chunk is None else s for s in config.layers)
    )


def _unnormed(spec: LayerSpec) -> LayerSpec:
    return replace(spec, placement="rope") if spec.placement == "rope_norm" else spec


MISTAKES: dict[str, tuple[str, Callable[[ModelConfig], ModelConfig]]] = {
    "no chunks": ("llama-4-scout", lambda c: _without(c, chunk=None)),
    "chunks on every layer": ("llama-4-scout", lambda c: _without(c, chunk=16)),
    "no temperature": ("llama-4-scout", lambda c: replace(c, temper=Temper(floor_scale=1e9))),
    "temperature one position late": ("llama-4-scout", lambda c: replace(c, temper=Temper(floor_scale=9.0))),
    "no QK norm": ("llama-4-scout", lambda c: replace(c, layers=tuple(_unnormed(s) for s in c.layers))),
    "RoPE on every layer": ("llama-4-scout", _positioned),
    "Scout without scaling": ("llama-4-scout", lambda c: replace(c, rope_scaling=None)),
    "epsilon of Llama 1": ("llama-2", lambda c: replace(c, norm_eps=1e-3)),
    "theta of Llama 2": ("code-llama", lambda c: replace(c, rope_theta=1e4)),
    "scaling of 3.1": ("llama-3.2", lambda c: replace(c, rope_scaling=RopeScaling(factor=8.0))),
    "no scaling": ("llama-3.1", lambda c: replace(c, rope_scaling=None)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_show(mistake: str) -> None:
    """The same weights under a wrong config differ by far more than the bound: the parity tests can fail."""
    name, change = MISTAKES[mistake]
    right = build(name)
    wrong = Llama(change(right.config)).eval()
    wrong.load_state_dict(right.state_dict())
    far = torch.arange(0, 40) * (4000 if right.config.temper is None else 1)
    ids = tokens(right.config, 40)
    positions = far if right.config.temper is None else None
    if mistake == "Scout without scaling":  # wavelengths above 8,192 only: seen over a long sequence
        ids, positions = tokens(right.config, 600), None
    assert difference(wrong, oracle(right), ids, positions) > 100 * FP32_BOUND
