"""RMSNorm, with Meta's order of rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from herd.kernels import onepass

__all__ = ["RMSNorm", "normed", "rms"]


def rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dim, computed in fp32, returned in x's dtype; no weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms(x) * weight, of one dtype: in one pass where gradients are wanted and the native library can."""
    if onepass.fits(x, weight):
        return onepass.rms_norm(x, weight, eps)
    return rms(x, eps) * weight


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
        return normed(x, self.weight, self.eps)
