"""How queries meet keys: the one function every layer is handed.

`attend(q, k, v, chunk) -> out` with q [..., S, H, Dh], k and v [..., S, Hkv, Dh], out [..., S, H, Dh]. Training and scoring
use the pure ones here; engines hand in functions bound to a cache (`herd.engine.cache`). Nothing in a layer knows which.

Letters: B sequences, S positions, K key positions, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from herd.kernels.documents import document_attention
from herd.model.config import ModelConfig

__all__ = ["Attend", "Causal", "Packed", "masked_attention", "packed", "uncached", "visible"]


class Attend(Protocol):
    """One layer's attention: always the mask, and the KV memory when decoding."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor: ...


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(Dh) + mask) v with grouped heads. q [..., S, H, Dh], k and v [..., K, Hkv, Dh] -> q's shape.

    `mask` is bool, True = may look, broadcastable to [..., 1, S, K]: the same for every head. None means causal (S == K).
    """
    grouped = q.shape[-2] != k.shape[-2]
    if grouped and mask is not None and q.shape[-3] == 1:
        return _one_query(q, k, v, mask)
    out = scaled_dot_product_attention(
        q.transpose(-2, -3),
        k.transpose(-2, -3),
        v.transpose(-2, -3),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=grouped,
    )
    return out.transpose(-2, -3)


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A decode step: the query heads that share a key/value head stand in for positions, so each key is read once.

    The fused CPU kernel reads keys once per query head otherwise: 2 to 3 times slower at 4,096 keys and four heads a group.
    """
    grouped = q.squeeze(-3).unflatten(-2, (k.shape[-2], -1))  # [..., Hkv, H / Hkv, Dh]
    out = scaled_dot_product_attention(grouped, k.transpose(-2, -3), v.transpose(-2, -3), attn_mask=mask)
    return out.flatten(-3, -2).unsqueeze(-3)


def visible(q_positions: Tensor, k_positions: Tensor, chunk: int | None) -> Tensor:
    """Which keys a query may see: earlier or equal positions, in the same chunk. [..., S] and [..., K] -> [..., S, K] bool."""
    q, k = q_positions[..., :, None], k_positions[..., None, :]
    mask = k <= q
    if chunk is not None:
        mask = mask & (k // chunk == q // chunk)
    return mask


@dataclass(frozen=True, slots=True)
class Causal:
    """Whole sequences that start at position 0: training without packing, scoring, right-padded batches."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        length = q.shape[-3]
        if chunk is None or length <= chunk:
            return masked_attention(q, k, v, None)
        # Chunks do not see each other, so each is its own causal attention: no [S, S] mask, and less work than one.
        parts = [slice(start, start + chunk) for start in range(0, length, chunk)]
        return torch.cat(
            [masked_attention(q[..., p, :, :], k[..., p, :, :], v[..., p, :, :], None) for p in parts], dim=-3
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """Documents packed back to back: `positions` [B, S] restart at 0 at each document's first token.

    Those restarts are the only record of document borders, so rotary angles and mask cannot disagree. Use `packed`, which
    builds what is needed before the first layer runs: a block compiled on its own must not find a mask missing. On a CPU that
    is where documents begin, and no mask is made.
    """

    positions: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    firsts: dict[int | None, Tensor] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        if chunk not in self.firsts:
            return masked_attention(q, k, v, self.mask(chunk))
        q_flat, k_flat, v_flat = (x.flatten(0, -3).contiguous() for x in (q, k, v))
        return document_attention(q_flat, k_flat, v_flat, self.firsts[chunk])[0].view(q.shape)

    def mask(self, chunk: int | None) -> Tensor:
        """[B, 1, S, S] bool, built once per distinct `chunk`."""
        if chunk not in self.masks:
            document = (self.positions == 0).cumsum(-1)
            same = document[..., :, None] == document[..., None, :]
            self.masks[chunk] = (same & visible(self.positions, self.positions, chunk)).unsqueeze(-3)
        return self.masks[chunk]

    def first(self, chunk: int | None) -> Tensor:
        """[B * S] bool, where a row, a document or a chunk of one begins: what lies between sees itself causally."""
        if chunk not in self.firsts:
            begins = self.positions == 0 if chunk is None else self.positions % chunk == 0
            begins[..., 0] = True
            self.firsts[chunk] = begins.flatten()
        return self.firsts[chunk]


def packed(config: ModelConfig, positions: Tensor) -> Sequence[Attend]:
    """One Attend per layer for packed documents at `positions` [B, S], see `Packed`."""
    see = Packed(positions)
    for chunk in dict.fromkeys(spec.chunk for spec in config.layers):
        if positions.device.type == "cpu":
            see.first(chunk)
        else:
            see.mask(chunk)
    return (see,) * config.n_layers


def uncached(n_layers: int) -> Sequence[Attend]:
    """Plain causal attention for every layer."""
    return (Causal(),) * n_layers
