"""Memory while a model runs: keys and values, and what computing needs besides the weights."""

from __future__ import annotations

from dataclasses import dataclass

from herd.errors import ConfigError
from herd.model.accounting import kv_bytes_per_token
from herd.model.config import ModelConfig
from herd.planning.devices import GIB

__all__ = ["KV", "PREFILL", "RUNTIME", "KVType", "cross_bytes", "kv_bytes", "kv_type", "workspace_bytes"]

PREFILL = 512
"""Tokens of a prompt read at a time, as herd's own session does."""

RUNTIME = {"cpu": GIB // 2, "gpu": GIB}
"""Assumed for the program itself, per device: libraries, contexts, compiled kernels, fragments of freed memory."""


@dataclass(frozen=True, slots=True)
class KVType:
    """How keys and values are kept: bytes of one value, and of the scale that each head of a token has beside them."""

    name: str
    per_value: float
    per_head: float = 0.0

    def bytes_per_value(self, head_dim: int) -> float:
        """With the share of the scale."""
        return self.per_value + self.per_head / head_dim


KV = {
    kind.name: kind
    for kind in (
        KVType("f32", 4),
        KVType("bf16", 2),
        KVType("f16", 2),
        KVType("int8", 1, 2),
        KVType("fp8", 1),
        KVType("q8_0", 34 / 32),
        KVType("q4_0", 18 / 32),
    )
}


def kv_type(name: str) -> KVType:
    """The type called `name`. Raises ConfigError listing the known ones."""
    found = KV.get(name.strip().lower())
    if found is None:
        raise ConfigError(f"keys and values cannot be planned as {name[:40]!r}: choose {', '.join(KV)}")
    return found


def kv_bytes(config: ModelConfig, kind: KVType, context: int, *, free_chunks: bool = False) -> int:
    """Keys and values of one sequence of `context` tokens.

    Chunked layers (Llama 4) never look back beyond their chunk: `free_chunks` counts what a cache needs that drops it.
    """
    per_layer = kv_bytes_per_token(config, kind.bytes_per_value(config.head_dim)) / config.n_layers
    kept = (min(context, spec.chunk) if free_chunks and spec.chunk else context for spec in config.layers)
    return round(per_layer * sum(kept))


def cross_bytes(config: ModelConfig, layers: int, tokens: int) -> int:
    """Keys and values in 16 bits of `tokens` vision tokens in `layers` cross-attention layers."""
    return 2 * layers * tokens * config.n_kv_heads * config.head_dim * 2


def workspace_bytes(config: ModelConfig, context: int, batch: int) -> int:
    """Activations of one layer while a piece of a prompt is read, and the logits, which are float32.

    Fused attention is assumed: no matrix of scores. Pieces have PREFILL tokens, or one per sequence when those are more.
    """
    tokens = max(min(PREFILL, context), batch)
    width = 4 * config.dim + (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    hidden = config.hidden_dim
    if config.moe is not None:
        hidden = max(hidden, (1 + config.moe.top_k) * config.moe.hidden_dim)
    return tokens * (width + 3 * hidden) * 2 + batch * config.vocab_size * 4 * 2
