"""The decoder: one definition for Llama 1 to 4, trained, served, quantized and sharded from the same class.

It holds weights and rotary frequencies: no cache, no mask, no process group, no compile flag. Attention is handed in, one
function per layer (`herd.model.attend`); everything else is a transformation of a finished model.

Letters: B sequences, S positions, D dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from herd.model.attend import Attend, uncached
from herd.model.attention import Attention
from herd.model.config import LayerSpec, ModelConfig
from herd.model.feedforward import FeedForward
from herd.model.moe import MoE
from herd.model.norm import RMSNorm
from herd.model.rope import Rope, Rotary

__all__ = ["Block", "Llama"]


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward (dense or experts). x [..., S, D] -> [..., S, D]."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, spec)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = _feed_forward(config, spec)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        h = x + self.attention(self.attention_norm(x), rotary, attend)
        return h + self.feed_forward(self.ffn_norm(h))


def _feed_forward(config: ModelConfig, spec: LayerSpec) -> nn.Module:
    if spec.moe:
        assert config.moe is not None  # ModelConfig refuses the other case
        return MoE(config.dim, config.moe)
    return FeedForward(config.dim, config.hidden_dim)


class Llama(nn.Module):
    """tokens [B, S] -> logits [B, S, V], in four verbs: embed, hidden, output, forward.

    Weights start as torch's defaults; training calls `herd.model.init.init_weights`, loading fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.rope = Rope(config)
        self.layers = nn.ModuleList(Block(config, spec) for spec in config.layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [..., S] int -> x [..., S, D]."""
        return self.tok_embeddings(tokens)

    def hidden(self, x: Tensor, positions: Tensor | None = None, attend: Sequence[Attend] | None = None) -> Tensor:
        """x [..., S, D] -> final normalised states [..., S, D].

        `positions` [S] or [..., S] default to 0..S-1; `attend` has one function per layer and defaults to plain causal,
        which takes chunks to begin at the first row: other starts need an `attend` that knows them (a cache, `packed`).
        """
        positions = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
        rotary = self.rope(positions)
        attend = uncached(len(self.layers)) if attend is None else attend
        for block, see in zip(self.layers, attend, strict=True):
            x = block(x, rotary, see)
        return self.norm(x)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, attend: Sequence[Attend] | None = None
    ) -> Tensor:
        return self.output(self.hidden(self.embed(tokens), positions, attend))
