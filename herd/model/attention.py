"""Self-attention: projections around a placement and the `attend` it is handed.

Letters: D dim, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from herd.model.attend import Attend
from herd.model.config import LayerSpec, ModelConfig
from herd.model.rope import Rotary, make_placement

__all__ = ["Attention"]


class Attention(nn.Module):
    """x [..., S, D] -> [..., S, D]. Leading dims are the caller's affair; only `attend` interprets them."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.head_dim, self.chunk = config.head_dim, spec.chunk
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.place = make_placement(config, spec)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # [..., S, H, Dh]; -1: the local heads when sharded
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # [..., S, Hkv, Dh]
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        q, k = self.place(q, k, rotary)
        return self.wo(attend(q, k, v, self.chunk).flatten(-2))
