"""What the native kernels compute, in plain torch: slow, short, and the measure they are tested against.

Before a quantized matrix, activations are rounded to 8 bits with one scale per 128 columns; keys and values in an int8 cache
are rounded the same way, with one scale per token and head. Sums are exact integers or float32, so that only the order of
float additions separates a kernel from its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["ACTIVATION_GROUP", "product", "rounded", "to_bytes"]

ACTIVATION_GROUP = 128
"""Columns that share an activation scale; csrc/formats.h has the same number."""

_LEAST = 127.0 * torch.finfo(torch.float32).tiny  # the scale stays a normal number, and its inverse finite


def to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] float32 -> (int8 [..., n], scale [..., 1]), scale = largest magnitude / 127.

    A row with a value that is no finite number gets the scale NaN: nothing computed from it looks like an answer.
    """
    top = x.abs().amax(-1, keepdim=True)
    good = top.isfinite()
    top = torch.where(good, top.clamp_min(_LEAST), torch.nan)
    inverse = torch.full_like(top, 127.0) / top  # a number over a tensor would be its reciprocal times the number
    numbers = torch.where(good, (x * inverse).round(), 0.0).to(torch.int8)
    return numbers, top / 127.0


def rounded(x: Tensor, group: int = ACTIVATION_GROUP) -> Tensor:
    """x [..., K] as quantized products see it: to bytes and back in groups of columns; the last group may be shorter."""
    width = x.shape[-1]
    numbers, scale = to_bytes(pad(x, (0, -width % group)).unflatten(-1, (-1, group)))
    return (numbers * scale).flatten(-2)[..., :width]


def product(weight: Tensor, x: Tensor, *, quantized: bool) -> Tensor:
    """x [..., K] float32, weight [N, K] (decoded, when it is `quantized`) -> x @ weight^T [..., N], summed in float64."""
    return (rounded(x) if quantized else x).double() @ weight.double().T
