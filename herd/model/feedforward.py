"""The SwiGLU feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from herd.kernels import onepass

__all__ = ["FeedForward", "gated"]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: in one pass where gradients are wanted and the native library can."""
    return onepass.gate(gate, up) if onepass.fits(gate, up) else silu(gate) * up


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x). x [..., D] -> [..., D], inner width `hidden_dim`."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(gated(self.w1(x), self.w3(x)))
