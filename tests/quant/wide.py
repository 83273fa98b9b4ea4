"""Tiny models whose rows are whole super-blocks, so that every quantized type fits."""

from __future__ import annotations

from dataclasses import replace

from herd.model.config import ModelConfig, MoEConfig
from tests.build import DENSE, LLAMA4, TINY

__all__ = ["EXPERTS", "TIED", "WIDE", "wide"]

WIDE = replace(DENSE["llama-3"], dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=260)
TIED = replace(WIDE, tie_embeddings=True)
EXPERTS = replace(
    LLAMA4["llama-4-scout"], dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512,
    moe=MoEConfig(n_experts=4, hidden_dim=256),
)  # fmt: skip


def wide(name: str) -> ModelConfig:
    """The tiny config called `name` with rows of whole super-blocks: 8 query heads, all alone or four to a key head."""
    config = TINY[name]
    kv_heads = 8 if config.n_heads == config.n_kv_heads else 2
    moe = None if config.moe is None else replace(config.moe, hidden_dim=256)
    return replace(config, dim=256, n_heads=8, n_kv_heads=kv_heads, head_dim=32, hidden_dim=512, moe=moe)
