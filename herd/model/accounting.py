"""What a model costs, by arithmetic alone: parameters, bytes of keys and values, floating-point operations. Imports no torch.

Letters: V vocabulary, D dim, H query heads, Hkv key/value heads, Dh head_dim, F feed-forward width, E experts, k experts a
token goes to, L layers.
"""

from __future__ import annotations

from herd.model.config import LayerSpec, ModelConfig

__all__ = ["active_parameters", "flops_per_token", "kv_bytes_per_token", "parameters"]


def parameters(config: ModelConfig) -> int:
    """Trainable numbers, a tied matrix once: V D (twice when untied) + the layers + the final norm D."""
    matrices = 1 if config.tie_embeddings else 2
    layers = sum(_layer(config, spec) for spec in config.layers)
    return matrices * config.vocab_size * config.dim + layers + config.dim


def active_parameters(config: ModelConfig) -> int:
    """The part that one token passes through: k of the E routed experts, everything else. Both embeddings are counted."""
    if config.moe is None:
        return parameters(config)
    unused = config.moe.n_experts - config.moe.top_k
    moe_layers = sum(spec.moe for spec in config.layers)
    return parameters(config) - moe_layers * unused * _swiglu(config.dim, config.moe.hidden_dim)


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: float = 2) -> float:
    """Keys and values of one token over all layers: 2 L Hkv Dh values, of 2 bytes in bf16.

    Layers with a chunk need no more than `chunk` tokens of it; a cache that frees old chunks holds less.
    """
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * bytes_per_value


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Operations of the forward pass for the token that sees `context` tokens, itself included.

    Two (multiply, add) per weight of every matrix the token is multiplied with: active parameters without the norms and
    without the embedding look-up, but with the output matrix even when it is the embedding. Attention adds, per layer,
    2 H Dh operations for each of q k^T and its product with v, for every visible token; a chunked layer sees its own
    chunk only. Norms, rotations, softmax and activations are left out: well under one percent. Backward costs twice this.
    """
    norms = (2 * config.n_layers + 1) * config.dim
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    weights = active_parameters(config) - norms - looked_up
    visible = sum(context if spec.chunk is None else (context - 1) % spec.chunk + 1 for spec in config.layers)
    return 2 * weights + 4 * config.n_heads * config.head_dim * visible


def _layer(config: ModelConfig, spec: LayerSpec) -> int:
    """One layer: two norms, four projections, and a feed-forward or router, shared and routed experts."""
    heads = 2 * config.n_heads + 2 * config.n_kv_heads  # wq and wo, wk and wv
    rest = 2 * config.dim + config.dim * heads * config.head_dim
    if not spec.moe or config.moe is None:
        return rest + _swiglu(config.dim, config.hidden_dim)
    router = config.dim * config.moe.n_experts
    return rest + router + (1 + config.moe.n_experts) * _swiglu(config.dim, config.moe.hidden_dim)


def _swiglu(dim: int, hidden_dim: int) -> int:
    return 3 * dim * hidden_dim
