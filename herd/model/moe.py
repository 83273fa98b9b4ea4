"""Mixture of experts as in Llama 4: sigmoid routing, scores on the expert input, one shared expert.

Letters: T tokens, D dim, F expert width, E experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from herd.kernels.grouped import grouped_linear
from herd.model.config import MoEConfig
from herd.model.feedforward import FeedForward

__all__ = ["Experts", "MoE"]


class Experts(nn.Module):
    """E feed-forward layers. x [T, D] sorted by expert, counts [E] int64 -> [T, D].

    w1, w3 [E, F, D] and w2 [E, D, F]: each expert's matrices are [out, in], as in nn.Linear.
    """

    def __init__(self, dim: int, hidden_dim: int, n_experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=dim**-0.5)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        gate = grouped_linear(x, self.w1, counts)
        up = grouped_linear(x, self.w3, counts)
        return grouped_linear(silu(gate) * up, self.w2, counts)


class MoE(nn.Module):
    """x [..., D] -> [..., D]: shared_expert(x) + sum over the top-k experts e of expert_e(sigmoid(router(x))_e * x).

    The score is a sigmoid, not a softmax, and multiplies the expert's input (llama-models models/llama4/moe.py).
    """

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__()
        self.top_k, self.n_experts = moe.top_k, moe.n_experts
        self.router = nn.Linear(dim, moe.n_experts, bias=False)
        self.experts = Experts(dim, moe.hidden_dim, moe.n_experts)
        self.shared_expert = FeedForward(dim, moe.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        scores, chosen = self.router(x_TD).topk(self.top_k, dim=-1)  # [T, k]
        scores = scores.float().sigmoid().type_as(x)
        scaled = (x_TD[:, None] * scores[..., None]).flatten(0, 1)  # [T * k, D]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.zeros(self.n_experts, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        sorted_out = self.run(scaled, order, counts)
        routed = torch.empty_like(sorted_out).index_copy(0, order, sorted_out)
        routed = routed.unflatten(0, (-1, self.top_k)).sum(1)  # [T, D]
        return self.shared_expert(x) + routed.view_as(x)

    def run(self, scaled: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        """What the experts make of `scaled` [T * k, D], k rows a token, taken in the `order` [T * k] that sorts by expert."""
        return self.experts(scaled[order], counts)
