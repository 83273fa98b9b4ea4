"""Costs by arithmetic against costs by measurement."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from herd.engine.cache import StaticCache
from herd.model.accounting import active_parameters, flops_per_token, kv_bytes_per_token, parameters
from herd.model.presets import find
from tests.build import DENSE, LLAMA4, TINY, build, tiny, tokens


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_counted(name: str) -> None:
    assert parameters(tiny(name)) == sum(weight.numel() for weight in build(name).parameters())


@pytest.mark.parametrize("name", TINY)
def test_active_parameters(name: str) -> None:
    """Without the experts that a token does not go to."""
    model, config = build(name), tiny(name)
    if config.moe is None:
        assert active_parameters(config) == parameters(config)
        return
    routed = sum(weight.numel() for key, weight in model.named_parameters() if ".experts." in key)
    used = routed * config.moe.top_k // config.moe.n_experts
    assert active_parameters(config) == parameters(config) - routed + used


@pytest.mark.parametrize("name", TINY)
def test_kv_bytes_are_what_a_cache_holds(name: str) -> None:
    config = tiny(name)
    assert kv_bytes_per_token(config, 4) * 10 == StaticCache(config, max_len=10).nbytes
    half = StaticCache(config, max_len=10, dtype=torch.bfloat16).nbytes
    assert kv_bytes_per_token(config) * 10 == half


@pytest.mark.parametrize("context", [1, 2, 33])
@pytest.mark.parametrize("name", [*DENSE, "llama-guard-4"])
def test_flops_are_what_torch_counts(name: str, context: int) -> None:
    """One decoded token over `context` positions; dense models, since torch does not count the grouped product.

    Nor does it count the fused attention of CPUs: the unfused one is asked for.
    """
    model = build(name)
    kv = StaticCache(model.config, max_len=64)
    position = torch.tensor([context - 1])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens(model.config, 1), position, kv.bind(position, context))
    assert counter.get_total_flops() == flops_per_token(model.config, context)


@pytest.mark.parametrize("name", LLAMA4)
def test_chunked_layers_see_their_chunk(name: str) -> None:
    config = tiny(name)
    chunked = sum(spec.chunk is not None for spec in config.layers)
    per_key = 4 * config.n_heads * config.head_dim
    first_of_chunk, last_of_chunk = flops_per_token(config, 33), flops_per_token(config, 32)
    assert first_of_chunk - last_of_chunk == per_key * (config.n_layers - chunked * (1 + 15 if chunked else 1))


def test_known_figures() -> None:
    """Published rules of thumb: 128 KiB of keys and values a token in Llama 3 8B, about 2 operations a weight."""
    config = find("llama3:8b").config
    assert config is not None
    assert kv_bytes_per_token(config) == 131_072
    assert flops_per_token(config, 1) == pytest.approx(2 * (8.03e9 - 128_256 * 4096), rel=0.001)
