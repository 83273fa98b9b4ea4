"""Tiny members of every generation: the same differences as the real ones, at sizes that run in milliseconds.

`tiny(name)` gives a config, `build(name)` a model with random weights whose logits are of order one.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from herd.model.config import ModelConfig, MoEConfig, RopeScaling, Temper, irope, plain
from herd.model.llama import Llama

__all__ = ["DENSE", "LLAMA4", "TINY", "build", "fill", "tiny", "tokens"]

_LLAMA_2 = ModelConfig(
    dim=64,
    n_heads=4,
    n_kv_heads=4,
    head_dim=16,
    hidden_dim=176,
    vocab_size=320,
    layers=plain(2),
    rope_theta=10_000.0,
    max_seq_len=4096,
)
_LLAMA_3 = replace(_LLAMA_2, n_kv_heads=2, vocab_size=384, rope_theta=500_000.0, max_seq_len=8192)
# With theta 500,000 and head_dim 16 the wavelengths lie on both sides of and between 2,048 and 8,192: every branch of the
# scaling rule is used.
_LLAMA_31 = replace(_LLAMA_3, rope_scaling=RopeScaling(factor=8.0), max_seq_len=131_072)
_SCOUT = ModelConfig(
    dim=80,
    n_heads=5,
    n_kv_heads=1,
    head_dim=16,
    hidden_dim=192,
    vocab_size=400,
    layers=irope(4, chunk=16, moe_layers=range(4)),
    rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
    max_seq_len=262_144,
    moe=MoEConfig(n_experts=4, hidden_dim=96),
    temper=Temper(floor_scale=8.0),
)

DENSE: dict[str, ModelConfig] = {
    "llama-1": replace(_LLAMA_2, norm_eps=1e-6, max_seq_len=2048),
    "llama-2": _LLAMA_2,
    "llama-2-70b": replace(_LLAMA_2, n_kv_heads=1, hidden_dim=224),
    "code-llama": replace(_LLAMA_2, vocab_size=336, rope_theta=1_000_000.0, max_seq_len=16_384),
    "llama-3": _LLAMA_3,
    "llama-3.1": _LLAMA_31,
    "llama-3.2": replace(_LLAMA_31, rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True),
}
LLAMA4: dict[str, ModelConfig] = {
    "llama-4-scout": _SCOUT,
    "llama-4-maverick": replace(
        _SCOUT,
        layers=irope(4, chunk=16, moe_layers=(1, 3), qk_norm=False),
        rope_scaling=None,
        moe=MoEConfig(n_experts=8, hidden_dim=96),
    ),
    "llama-4-top-2": replace(_SCOUT, moe=MoEConfig(n_experts=4, top_k=2, hidden_dim=96)),
    "llama-guard-4": replace(_SCOUT, layers=irope(4, chunk=None), hidden_dim=96, rope_scaling=None, moe=None),
}
TINY = DENSE | LLAMA4


def tiny(name: str) -> ModelConfig:
    """The tiny config called `name`."""
    return TINY[name]


def fill(model: Llama, seed: int = 0) -> Llama:
    """Random weights that keep activations and logits of order one, norm weights away from one; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise)
            else:
                lookup_only = name == "tok_embeddings.weight" and not model.config.tie_embeddings
                weight.copy_(noise if lookup_only else noise * weight.shape[-1] ** -0.5)
    return model


def build(name: str | ModelConfig, seed: int = 0) -> Llama:
    """A random fp32 model on the CPU, in eval mode."""
    return fill(Llama(TINY[name] if isinstance(name, str) else name), seed).eval()


def tokens(config: ModelConfig, length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)
