"""RMSNorm, with Meta's order of rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RMSNorm", "rms"]


def rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dim, computed in fp32, returned in x's dtype; no weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


class RMSNorm(nn.Module):
    """y = cast(x32 * rsqrt(mean(x32^2) + eps)) * weight. x [..., D] -> [..., D], any float dtype.

    The cast back happens before the weight, as in Meta's and Hugging Face's code: the other order changes bf16 logits in the
    third digit.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps) * self.weight
