"""The block types of 256 values, encoded: llama.cpp's search for the scales, without an importance matrix.

Each function takes N blocks of values [N, 256] float32 and returns their bytes [N, nbytes] uint8; it is the inverse of its
namesake in `herd.quant.blocks`. The search is the one of llama.cpp's reference rows (ggml-quants.c): every group of 16 or 32
values tries about 20 scales around the obvious one, fits the best scale (and minimum) to the integers each gives, and keeps the
fit with the least weighted squared error; then the scales of a block are rounded to 6 or 8 bits, and the values are rounded
again with what remains of them. On a CPU every sum runs in memory order, one float32 addition after the other, as the scalar C
code's do: the bytes are then equal to those of llama.cpp on x86-64. Elsewhere sums may be ordered otherwise, and a
near-tie can fall to the other side.

With an importance matrix (how much each column matters: the mean square of what it is multiplied with) the search minimizes
another error: a value's weight is its column's importance times sqrt(spread of the block + x^2), as llama.cpp weighs them, and
more scales are tried. The scales of a block are rounded as without one, so these bytes are not llama.cpp's.

The work is laid out [group size, groups]: a column is a group, and an operation on a row is one vector operation for all groups.

Letters: N blocks, G groups; x values, q integers, w weights; d scale, m minimum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["q4_k", "q5_k", "q6_k", "symmetric_search"]

TINY = 1e-15
"""Q6_K: groups and blocks whose magnitudes stay below this become zeros."""


def q4_k(values: Tensor, importance: Tensor | None = None) -> Tensor:
    """16 levels; scales tried: (14.0 to 16.0 in steps of 0.1) / range, with importance 14.1 to 15.9 in steps of 0.05."""
    tries = _steps(15, -1.0, 20) if importance is None else _steps(15, -0.9, 36, 0.05)
    q, head = _affine(values, importance, top=15, tries=tries)
    return torch.cat((head, _bytes(_pairs(q.view(32, -1, 4, 2)))), dim=1)


def q5_k(values: Tensor, importance: Tensor | None = None) -> Tensor:
    """32 levels; scales tried: (30.5 to 32.0 in steps of 0.1) / range, with importance 30.1 to 31.9 in steps of 0.05."""
    tries = _steps(31, -0.5, 15) if importance is None else _steps(31, -0.9, 36, 0.05)
    q, head = _affine(values, importance, top=31, tries=tries)
    fifth = torch.ge(q, 16).float()
    q.sub_(fifth, alpha=16)
    return torch.cat((head, _bytes(_joined(fifth.view(32, -1, 8), 2)), _bytes(_pairs(q.view(32, -1, 4, 2)))), dim=1)


def q6_k(values: Tensor, importance: Tensor | None = None) -> Tensor:
    """64 levels around 0, groups of 16; scales tried: (31.1 to 32.9 in steps of 0.1) / -extreme; scales in 8 bits."""
    x = values.view(-1, 16).t().contiguous()  # [16, G]
    weights = None if importance is None else importance.view(-1, 16).t().contiguous()
    scale, inverse = symmetric_search(x, weights)
    scales = scale.view(-1, 16)
    largest = scales.gather(1, scales.abs().argmax(dim=1, keepdim=True))
    empty = largest.abs() < TINY
    block_inverse = torch.full_like(largest, -128.0).div_(largest).masked_fill_(empty, 0.0)
    d = block_inverse.reciprocal().masked_fill_(empty, 0.0).half()
    small = scales.mul(block_inverse).round_().clamp_(-128, 127)
    step = (d.float() * small).view(-1)  # [G]
    q = (x / step).round_()
    lost = step == 0
    if lost.any():  # groups too small for the block's scale: their integers do not matter, but these are llama.cpp's
        q[:, lost] = (x[:, lost] * inverse[lost]).round_()
    q.clamp_(-32, 31).add_(32)
    q[:, empty.expand_as(scales).reshape(-1) | (lost & (inverse == 0))] = 0.0
    high = q.div(16).trunc_()
    q.sub_(high, alpha=16)
    low_bytes = _bytes(_pairs(q.view(16, -1, 2, 2, 4).transpose(3, 4)))
    high_bytes = _bytes(_joined(high.view(16, -1, 2, 4, 2).transpose(3, 4), 4))
    return torch.cat((low_bytes, high_bytes, small.to(torch.int8).view(torch.uint8), d.view(torch.uint8)), dim=1)


def _steps(top: int, first: float, count: int, step: float = 0.1) -> list[float]:
    """top + first + step i for i = 0 ... count, each operation rounded to float32."""
    f = np.float32
    return [float(f(f(first) + f(step) * f(i)) + f(top)) for i in range(count + 1)]


def _affine(values: Tensor, importance: Tensor | None, *, top: int, tries: list[float]) -> tuple[Tensor, Tensor]:
    """Blocks of eight groups of 32 -> q [32, G] of 0 to `top`, and the first 16 bytes of the blocks: d, dmin, scales, minima."""
    x = values.view(-1, 32).t().contiguous()  # [32, G]
    weights = None
    if importance is not None:
        spread = values.square().mean(dim=1, keepdim=True).mul_(2)
        weights = (importance * (spread + values.square()).sqrt_()).view(-1, 32).t().contiguous()
    scale, minimum, inverse, base = _affine_search(x, top, tries, weights)
    scales, minima = scale.view(-1, 8), minimum.view(-1, 8)
    small_scales, d = _six_bits(scales)
    small_minima, dmin = _six_bits(minima)
    step = (d.float() * small_scales).view(-1)  # [G]
    lift = (dmin.float() * small_minima).view(-1)
    q = (x + lift).div_(step).round_()
    flat = step == 0
    if flat.any():  # the block's scale is too coarse for this group: it becomes its minimum, the integers do not matter
        q[:, flat] = ((x[:, flat] - base[flat]) * inverse[flat]).round_()
        q.nan_to_num_(0.0)
    q.clamp_(0, top)
    head = torch.cat((d.view(torch.uint8), dmin.view(torch.uint8), _pack_scales(small_scales, small_minima)), dim=1)
    return q, head


def _affine_search(
    x: Tensor, top: int, tries: list[float], w: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [32, G] -> per group: scale, minimum (as a magnitude), and the 1 / scale and base that made the best integers.

    The model is x = scale * q - minimum with a minimum of at least 0. Weights `w` are |x| + rms(x) unless given.
    """
    if w is None:
        rms = _in_order(x * x).div_(32).double().sqrt_().float()  # torch's float32 square root is not correctly rounded
        w = x.abs().add_(rms)
    total, moment = _in_order(torch.stack((w, w * x)))
    low, high = x.amin(dim=0).clamp_(max=0.0), x.amax(dim=0)
    inverse = torch.full_like(low, top).div_(high - low)
    base, scale = low, inverse.reciprocal()
    q, products = torch.empty_like(x), x.new_empty((3, *x.shape))
    torch.sub(x, low, out=q).mul_(inverse).round_().clamp_(0, top)
    error = _weighted_error(q, scale, low, x, w)
    for number in tries:
        tried = torch.full_like(low, number).div_(high - low)
        torch.sub(x, low, out=q).mul_(tried).round_().clamp_(0, top)
        torch.mul(w, q, out=products[0])
        torch.mul(products[0], q, out=products[1])
        torch.mul(products[0], x, out=products[2])
        sum_q, sum_qq, sum_qx = _in_order(products)
        determinant = total * sum_qq - sum_q * sum_q
        new_scale = (total * sum_qx - moment * sum_q).div_(determinant)
        new_low = (sum_qq * moment - sum_q * sum_qx).div_(determinant)
        above = new_low > 0
        new_scale = torch.where(above, sum_qx.div_(sum_qq), new_scale)
        new_low.masked_fill_(above, 0.0)
        new_error = _weighted_error(q, new_scale, new_low, x, w)
        better = (new_error < error).logical_and_(determinant > 0)
        inverse, base = torch.where(better, tried, inverse), torch.where(better, low, base)
        error, scale = torch.where(better, new_error, error), torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)  # the next candidate starts from the best minimum so far
    return scale, low.neg_(), inverse, base


def _weighted_error(q: Tensor, scale: Tensor, low: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Sum of w (scale * q + low - x)^2 per group. `q` is used up."""
    q.mul_(scale).add_(low).sub_(x)
    return _in_order(q.mul_(q).mul_(w))


def symmetric_search(x: Tensor, w: Tensor | None = None, top: int = 32) -> tuple[Tensor, Tensor]:
    """x [group size, G] -> per group: scale, and the 1 / scale that made the best integers, -top to top - 1.

    The model is x = scale * q. Weights `w` [group size, G] are x^2 unless given.
    """
    high, low = x.amax(dim=0), x.amin(dim=0)
    extreme = torch.where(high > -low, high, low)
    tied = high == -low
    if tied.any():
        columns = x[:, tied]
        extreme[tied] = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    if w is None:
        w = x * x
    wx = w * x
    q, products = torch.empty_like(x), x.new_empty((2, *x.shape))
    inverse = scale = best = torch.zeros_like(extreme)
    for i, number in enumerate(_symmetric_steps(top)):
        tried = torch.full_like(extreme, number).div_(extreme)
        torch.mul(x, tried, out=q).round_().clamp_(-top, top - 1)
        torch.mul(wx, q, out=products[0])
        torch.mul(w, q, out=products[1]).mul_(q)
        sum_qx, sum_qq = _in_order(products)
        if i == 0:
            inverse, scale = tried, (sum_qx / sum_qq).masked_fill_(sum_qq == 0, 0.0)
            best = scale * sum_qx
            continue
        better = (sum_qx * sum_qx > best * sum_qq).logical_and_(sum_qq > 0)
        new_scale = sum_qx / sum_qq
        inverse, scale = torch.where(better, tried, inverse), torch.where(better, new_scale, scale)
        best = torch.where(better, new_scale * sum_qx, best)
    empty = extreme.abs() < TINY
    return scale.masked_fill(empty, 0.0), inverse.masked_fill(empty, 0.0)


def _symmetric_steps(top: int) -> list[float]:
    """-top first, then -(top + 0.1 i) for i = -9 ... 9 without 0, in float32."""
    f = np.float32
    return [float(-top), *(float(-(f(top) + f(0.1) * f(i))) for i in range(-9, 10) if i != 0)]


def _in_order(terms: Tensor) -> Tensor:
    """[..., n, G] -> [..., G]: sums over n, on a CPU one addition after the other from the first.

    numpy adds the rows of an outer dimension in turn; torch.sum promises no order.
    """
    if terms.is_cpu:
        with np.errstate(all="ignore"):  # values that are not finite are refused when the block is complete
            return torch.from_numpy(np.add.reduce(terms.numpy(), axis=-2))
    return terms.sum(dim=-2)


def _six_bits(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 8] numbers >= 0 -> whole numbers 0 to 63 (float32) and the fp16 unit [N, 1] they count."""
    largest = numbers.amax(dim=1, keepdim=True).clamp_(min=0.0).add_(0.0)  # + 0: no negative zero
    inverse = torch.full_like(largest, 63.0).div_(largest)
    inverse.masked_fill_((largest == 0) | inverse.isinf(), 0.0)
    small = numbers.mul(inverse).round_()
    # A negative number wraps around in llama.cpp's byte and is then cut to 63.
    small = torch.where(small < 0, 63.0, small)
    return small.clamp_(max=63), largest.div_(63).half()


def _pack_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Two times [N, 8] of six bits -> [N, 12]; the layout is explained at `blocks.k_scales`."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    a = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    b = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    c = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat((a, b, c), dim=1)


# Packing is float arithmetic on small whole numbers, which is exact: torch has no fast shifts of bytes.


def _pairs(q: Tensor) -> Tensor:
    """[..., 2] nibbles -> [...] bytes, the first one low."""
    return torch.add(q[..., 0], q[..., 1], alpha=16)


def _joined(q: Tensor, base: int) -> Tensor:
    """[..., p] numbers below `base` -> [...] bytes, the first one lowest."""
    joined = q[..., 0].clone()
    for i in range(1, q.shape[-1]):
        joined.add_(q[..., i], alpha=base**i)
    return joined


def _bytes(numbers: Tensor) -> Tensor:
    """[group size, N, ...] whole numbers of 0 to 255 -> [N, bytes], a group's values side by side again."""
    return numbers.movedim(0, -1).to(torch.uint8).flatten(1)
