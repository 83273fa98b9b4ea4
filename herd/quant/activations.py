"""Activations rounded to 8 bits: the plain definition of what the native products do before they multiply."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["GROUP", "eight_bits"]

GROUP = 128
"""Columns that share a scale (ACT_GROUP in csrc/formats.h)."""


def eight_bits(x: Tensor) -> Tensor:
    """x [..., columns], any float dtype -> the same in float32 with every value one of 255 levels: d q, where d is the largest
    magnitude of a value's GROUP neighbouring columns over 127 and q = x / d rounded to nearest, ties to even.

    Zero groups stay zero. A product with these is the W8A8 reference: integer sums times the two scales, up to float32 rounding.
    """
    columns = x.shape[-1]
    groups = pad(x.float(), (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 0, 127 / top, torch.zeros_like(top))
    return ((groups * inverse).round() * (top / 127)).flatten(-2)[..., :columns]
