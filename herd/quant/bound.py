"""How far a stored number may lie from its source: bounds that follow from the formats, value by value.

They hold for what `encode` makes and, since its bytes equal llama.cpp's, for files of llama.cpp, and they are tight enough that
a scale off by one, swapped nibbles or rows of another tensor break them.

Letters: x value, q integer, d scale and m minimum as the encoder computed them, d' and m' as the file has them (fp16).

**Plain types.** Half a unit in the last place: x is rounded once, to nearest.

**32 values a block.** d is known from the values (Q8_0: largest magnitude / 127; Q4_0 and Q5_0: extreme / 8 and / 16; Q5_1:
range / 31), and q is x / d to nearest, so |x - d q| <= d / 2, and up to d for values of Q4_0 and Q5_0 beyond the last level
on the side without the extreme. The file has d' instead: another |q| |d - d'|, where |q| <= |x / d| + 1/2. Q5_1 adds
|m - m'|. Files made with an importance matrix have other scales for Q4_0, Q5_0 and Q5_1 and break this bound.

**256 values a block.** Two bounds, of which the smaller counts.

1. Given the stored scales, every value takes the nearest level of its group: half a step for values between the
   levels, the distance to the last level for those beyond. Every encoder that rounds after fixing its scales keeps this.
2. The search only ever takes a fit whose weighted squared error is below that of the first, obvious one, E0, which is a function
   of the values: so |x - s q + m| <= sqrt(E0 / w) for a value of weight w. Rounding the scale s and minimum m to multiples of the
   block's units adds at most half a unit each (and what rounding the unit to fp16 costs), times q for the scale. This bound
   makes a file with useless scales fail, which the first would let pass. Q6_K's weights are x^2: it says nothing for x near 0.
   With an importance matrix llama.cpp minimizes another error, and up to one value in 200 lies outside: `importance=True`
   leaves this bound away.

Both get a slack of some float32 roundings of the encoder's arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from herd.quant import blocks
from herd.quant.encode import encode
from herd.quant.scheme import QuantTensor

__all__ = ["bound"]

SLACK = 2.0**-19
"""Of value and step: the encoders' float32 operations (a product, a sum, a quotient) have rounded at most a few units of 2^-24
of the largest number in them, which is at most 32 steps."""
SEARCH = 1.001
"""The search compares errors that are float32 sums of 32 terms."""
TINY_HALF = 2.0**-25
"""Half the smallest subnormal of fp16: rounding to fp16 costs at most this, or 2^-11 of the number."""

_PLACES = {
    "F16": (-13, 12),
    "BF16": (-125, 9),
}  # exponent of the smallest normal number as frexp has it; bits to half a unit


def bound(values: Tensor, kind: str, stored: QuantTensor | None = None, *, importance: bool = False) -> Tensor:
    """Bound on |value - stored value|, float32 in the shape of `values` [..., columns], for storage as `kind`.

    `stored`: the blocks that are judged; Q4_K, Q5_K and Q6_K need their scales, and take those of `encode` without it. Scratch
    is about ten times `values`: hand in slices of rows. Where a value is not finite, its bound is not either. `importance`: the
    blocks were made with an importance matrix (llama.cpp writes `quantize.imatrix.file` into such files): Q4_K, Q5_K and Q6_K
    then only have to take the nearest of their levels.

    Raises what `encode` raises for values that the type cannot hold (for blocks, when `stored` is not given), and ValueError
    when `stored` is of another type or shape.
    """
    if kind == "F32":
        return torch.zeros_like(values, dtype=torch.float32)
    if kind in _PLACES:
        encode(values, kind)
        smallest, places = _PLACES[kind]
        exponent = torch.frexp(values.float()).exponent.clamp_(min=smallest)
        return torch.ldexp(torch.ones_like(values, dtype=torch.float32), exponent - places)
    if stored is None:
        made = encode(values, kind)
        assert isinstance(made, QuantTensor)
        stored = made
    if stored.type.name != kind or stored.shape != tuple(values.shape):
        raise ValueError(
            f"{stored.type.name} blocks of shape {stored.shape} for {kind} values of {tuple(values.shape)}"
        )
    x = values.reshape(-1, stored.type.values).double()
    raw = stored.blocks.reshape(-1, stored.type.nbytes)
    if kind in ("Q4_K", "Q5_K"):
        found = _affine_groups(x.view(-1, 8, 32), raw, 15 if kind == "Q4_K" else 31, importance)
    elif kind == "Q6_K":
        found = _symmetric_groups(x.view(-1, 16, 16), raw, importance)
    elif kind == "Q5_1":
        found = _one_range(x, 31)
    else:
        found = _one_scale(x, {"Q8_0": 127, "Q4_0": 8, "Q5_0": 16}[kind], clipped=kind != "Q8_0")
    return found.reshape(values.shape).float()


def _one_scale(x: Tensor, levels: int, *, clipped: bool) -> Tensor:
    """Q8_0, Q4_0, Q5_0. `clipped`: there are levels - 1 levels on the side without the extreme."""
    extreme = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    d = extreme.abs() / levels
    u = (x.abs() / d).nan_to_num_(0.0)  # in steps; a block of zeros has none
    away = torch.full_like(x, 0.5)
    if clipped:
        tied = (extreme.abs() == x.abs().masked_fill(x.sign() == extreme.sign(), -1.0)).any(dim=1, keepdim=True)
        other = (x.sign() != extreme.sign()) | tied  # with a tie either sign may have been taken for the extreme
        away = torch.where(other, (u - (levels - 1)).clamp_(min=0.5), away)
    return d * away + (u + 0.5) * _lost(d) + SLACK * (x.abs() + d)


def _one_range(x: Tensor, levels: int) -> Tensor:
    """Q5_1."""
    m = x.amin(dim=1, keepdim=True)
    d = (x.amax(dim=1, keepdim=True) - m) / levels
    u = ((x - m) / d).nan_to_num_(0.0)
    return d / 2 + (u + 0.5) * _lost(d) + _lost(m) + SLACK * (x.abs() + m.abs() + d)


def _lost(number: Tensor) -> Tensor:
    """What rounding to fp16 costs: number is a float32 that was computed in one or two roundings."""
    return (number - number.float().half().double()).abs() + number.abs() * 2.0**-22


def _affine_groups(x: Tensor, raw: Tensor, top: int, importance: bool) -> Tensor:
    """Q4_K, Q5_K. x [N, 8, 32]."""
    step, lift = (t.double().unsqueeze(-1) for t in blocks.k_scales(raw))
    near = _nearest(x, -lift, top * step - lift, step)
    slack = SLACK * (x.abs() + lift.abs() + step.abs())
    if importance:
        return near + slack
    w = x.abs() + x.square().mean(dim=2, keepdim=True).sqrt()
    low = x.amin(dim=2, keepdim=True).clamp_(max=0.0)
    first = (x.amax(dim=2, keepdim=True) - low) / top
    error = (x - low - first * ((x - low) / first).nan_to_num_(0.0).round_()).square_().mul_(w)
    fit = (error.sum(dim=2, keepdim=True) / w).nan_to_num_(0.0).sqrt_() * SEARCH
    unit_d, unit_m = (_unit(raw, at) for at in (0, 2))
    rounding = top * _off_by_half(unit_d, 63) + _off_by_half(unit_m, 63)
    return torch.minimum(near, fit + rounding) + slack


def _symmetric_groups(x: Tensor, raw: Tensor, importance: bool) -> Tensor:
    """Q6_K. x [N, 16, 16]."""
    unit = _unit(raw, 208)
    step = unit * raw[:, 192:208].view(torch.int8).double().unsqueeze(-1)
    near = _nearest(x, torch.minimum(-32 * step, 31 * step), torch.maximum(-32 * step, 31 * step), step.abs())
    slack = SLACK * (x.abs() + step.abs())
    if importance:
        return near + slack
    extreme = x.gather(2, x.abs().argmax(dim=2, keepdim=True))
    first = extreme / -32
    q = (x / first).nan_to_num_(0.0).round_().clamp_(-32, 31)
    error = (x - first * q).square_().mul_(x.square()).sum(dim=2, keepdim=True)
    fit = (error.sqrt() / x.abs()).nan_to_num_(torch.inf) * SEARCH
    # a scale of 128 units is cut to 127: off by a whole unit, not by half of one
    rounding = 32 * (_off_by_half(unit.abs(), 128) + (unit.abs() + _half_lost(unit.abs())) / 2)
    return torch.minimum(near, fit + rounding) + slack


def _nearest(x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> Tensor:
    """Distance of x from the nearest of the levels low ... high, at most."""
    beyond = torch.maximum(low - x, x - high)
    return torch.where(beyond > 0, beyond, step / 2)


def _unit(raw: Tensor, at: int) -> Tensor:
    return blocks.half(raw, at).double().unsqueeze(-1)


def _off_by_half(unit: Tensor, count: int) -> Tensor:
    """What rounding a number of at most `count` units to whole units costs, when `unit` itself was rounded to fp16."""
    lost = _half_lost(unit)
    return (unit + lost) / 2 + count * lost


def _half_lost(unit: Tensor) -> Tensor:
    return (unit.abs() * 2.0**-11).clamp_(min=TINY_HALF)
