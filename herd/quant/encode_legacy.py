"""The block types of 32 values, encoded: one scale from the extremes of the block, then rounding.

Each function takes N blocks of values [N, 32] float32 and returns their bytes [N, nbytes] uint8; it is the inverse of its
namesake in `herd.quant.blocks`. The rules and the order of the float32 operations are those of llama.cpp's reference rows
(ggml-quants.c) and of the `gguf` package, so the bytes are equal. A value that is not finite, or too large for the fp16 scale,
makes that scale infinite or NaN: `encode` looks there.

Letters as in `blocks`: N blocks; d scale, m minimum (fp16 in the file); q small integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from herd.quant.encode_k import symmetric_search

__all__ = ["q4_0", "q5_0", "q5_1", "q8_0"]

HALF = 0.49999997
"""The largest float32 below 1/2. Added with the sign of x before cutting, it rounds halves away from zero and nothing else up."""


def q8_0(values: Tensor) -> Tensor:
    """d = largest magnitude / 127, q = x / d rounded, halves away from zero."""
    d = _over(values.abs().amax(dim=1, keepdim=True), 127)
    scaled = values * _inverse(d)
    scaled.add_(torch.copysign(torch.full((), HALF, device=values.device), scaled))
    out = _with_halves(d, bytes_after=32)
    out[:, 2:].view(torch.int8).copy_(scaled)  # the conversion cuts
    return out


def q4_0(values: Tensor, importance: Tensor | None = None) -> Tensor:
    """d = the value of largest magnitude / -8, q = x / d + 8.5 cut, at most 15. With importance, d comes from a search."""
    d = _extreme(values).div_(-8) if importance is None else _searched(values, importance, 8)
    q = (values * _inverse(d)).add_(8.5).clamp_(0, 15).to(torch.uint8)
    out = _with_halves(d, bytes_after=16)
    _pack_nibbles(q.view(torch.int64), out[:, 2:])
    return out


def q5_0(values: Tensor, importance: Tensor | None = None) -> Tensor:
    """d = the value of largest magnitude / -16, q = x / d + 16.5 cut, at most 31. With importance, d comes from a search."""
    d = _extreme(values).div_(-16) if importance is None else _searched(values, importance, 16)
    q = (values * _inverse(d)).add_(16.5).clamp_(0, 31).to(torch.uint8)
    out = _with_halves(d, bytes_after=20)
    _pack_five_bits(q, out[:, 2:])
    return out


def q5_1(values: Tensor) -> Tensor:
    """m = smallest value, d = (largest - m) / 31, q = (x - m) / d + 0.5 cut."""
    m = values.amin(dim=1, keepdim=True)
    zero = (m == 0).squeeze(1)
    if zero.any():  # of two zeros the first counts, whatever its sign
        rows = values[zero]
        m[zero] = rows.gather(1, (rows == 0).int().argmax(dim=1, keepdim=True))
    d = _over(values.amax(dim=1, keepdim=True).sub_(m).add_(0.0), 31)  # + 0: no negative zero
    q = (values - m).mul_(_inverse(d)).add_(0.5).to(torch.uint8).clamp_(max=31)
    out = _with_halves(torch.cat((d, m), dim=1), bytes_after=20)
    _pack_five_bits(q, out[:, 4:])
    return out


def _searched(values: Tensor, importance: Tensor, top: int) -> Tensor:
    """[N, 1]: the scale of least error, each value weighted by its importance times sqrt(mean square of the block + x^2),
    rounded to fp16 so that the integers belong to the scale that is stored."""
    spread = values.square().mean(dim=1, keepdim=True)
    weights = importance * (spread + values.square()).sqrt_()
    scale, _ = symmetric_search(values.t().contiguous(), weights.t().contiguous(), top)
    return scale.half().float().unsqueeze(1)


def _extreme(values: Tensor) -> Tensor:
    """[N, 1]: the value of largest magnitude in each block, the first of them when both signs have it."""
    high, low = values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    tied = (high == -low).squeeze(1)
    if tied.any():
        rows = values[tied]
        extreme[tied] = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return extreme


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0 or so small that 1 / d overflows: such a block holds zeros, its fp16 scale is 0."""
    inverse = d.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0.0)


def _over(numbers: Tensor, divisor: float) -> Tensor:
    """numbers / divisor, rounded once: on a GPU, torch multiplies by the reciprocal of a plain number."""
    return numbers / torch.full_like(numbers, divisor)


def _with_halves(numbers: Tensor, *, bytes_after: int) -> Tensor:
    """New blocks [N, 2 k + bytes_after] that begin with `numbers` [N, k] as fp16."""
    halves = numbers.half().view(torch.uint8)
    out = torch.empty(len(halves), halves.shape[1] + bytes_after, dtype=torch.uint8, device=halves.device)
    out[:, : halves.shape[1]] = halves
    return out


# Packing works on eight bytes at a time as one int64: torch has no fast shifts of single bytes, and no bit here crosses a byte.


def _pack_nibbles(q: Tensor, out: Tensor) -> None:
    """q [N, 4] int64, which are [N, 32] bytes below 16 -> 16 bytes: low nibbles are values 0 to 15."""
    out.copy_((q[:, :2] | (q[:, 2:] << 4)).view(torch.uint8))


def _pack_five_bits(q: Tensor, out: Tensor) -> None:
    """q [N, 32] bytes below 32 -> 4 bytes of fifth bits, lowest first, and 16 bytes of nibbles."""
    eight = q.view(torch.int64)
    fifth = (eight >> 4) & 0x0101010101010101
    out[:, :4] = (
        (fifth * 0x0102040810204080) >> 56
    ) & 255  # the product's top byte has the lowest bits of the eight bytes
    _pack_nibbles(eight & 0x0F0F0F0F0F0F0F0F, out[:, 4:])
