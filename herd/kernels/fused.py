"""Small steps between the large products, each in one pass over its numbers: norms, gates, and placing keys in the cache.

Here they are plain torch, with the roundings of the model's own modules; on a CUDA device Triton kernels do the same
(`herd.kernels.triton`). None synchronises with the host, and none allocates when `out` is given.

Letters: T rows, D dim, F hidden_dim, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from herd.kernels.ops import fake, on_cuda, operation
from herd.kernels.paged import quantize_rows

__all__ = ["PLACEMENTS", "add_rms_norm", "place_write", "rms_norm", "silu_mul"]

PLACEMENTS = ("rope", "rope_norm", "none", "tempered")
"""How a layer places queries and keys; `herd.model.rope` defines them."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """cast(x32 / rms(x32)) * weight, as `herd.model.norm.RMSNorm`. x [T, D], weight [D] -> [T, D] in x's dtype."""
    out = torch.empty_like(x) if out is None else out
    rms_norm_out(x, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x += delta, in place and rounded to x's dtype; then `rms_norm` of x. x, delta [T, D] -> [T, D]."""
    out = torch.empty_like(x) if out is None else out
    add_rms_norm_out(x, delta, weight, eps, out)
    return out


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up. gate_up [T, 2F], the gates first -> [T, F]."""
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2) if out is None else out
    silu_mul_out(gate_up, out)
    return out


def place_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    placement: str = "rope",
    eps: float = 1e-5,
    temper: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Queries placed -> [T, H, Dh]; keys placed, and values as they are, into their slots of the cache.

    q [T, H, Dh], k and v [T, Hkv, Dh] may be views of one projection (the last two dimensions contiguous); cos, sin
    [T, Dh / 2] float32; slots [T] int64, where a negative one writes nothing; caches and scales as in `herd.kernels.paged`;
    `placement` one of PLACEMENTS; temper [T] float32, what "tempered" multiplies queries by; eps that of "rope_norm".
    """
    assert placement in PLACEMENTS, placement
    assert (temper is not None) or placement != "tempered"
    assert (k_scale is None) == (v_scale is None) == (k_cache.dtype != torch.int8)
    out = q.new_empty(q.shape) if out is None else out
    place_write_out(q, k, v, cos, sin, slots, k_cache, v_cache, k_scale, v_scale, placement, eps, temper, out)
    return out


def _rms(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


@operation(mutates=("out",))
def rms_norm_out(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See rms_norm."""
    out.copy_(_rms(x, eps) * weight)


@operation(mutates=("x", "out"))
def add_rms_norm_out(x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See add_rms_norm."""
    x.add_(delta)
    out.copy_(_rms(x, eps) * weight)


@operation(mutates=("out",))
def silu_mul_out(gate_up: Tensor, out: Tensor) -> None:
    """See silu_mul."""
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(silu(gate), up, out=out)


@operation(mutates=("k_cache", "v_cache", "k_scale", "v_scale", "out"))
def place_write_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    placement: str,
    eps: float,
    temper: Tensor | None,
    out: Tensor,
) -> None:
    """See place_write."""
    if placement in ("rope", "rope_norm"):
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if placement == "rope_norm":
        q, k = _rms(q, eps), _rms(k, eps)
    if placement == "tempered":
        assert temper is not None
        q = (q * temper[:, None, None]).type_as(q)
    out.copy_(q)
    wanted = slots >= 0
    at = slots[wanted]
    for new, cache, scales in ((k[wanted], k_cache, k_scale), (v[wanted], v_cache, v_scale)):
        if scales is None:
            cache.flatten(0, 1).index_copy_(0, at, new.to(cache.dtype))
        else:
            values, scale = quantize_rows(new)
            cache.flatten(0, 1).index_copy_(0, at, values)
            scales.flatten(0, 1).index_copy_(0, at, scale)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs of x [T, H, Dh], turned by the angles of their row; in float32, returned in x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


@fake(rms_norm_out)
def _(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    return None


@fake(add_rms_norm_out)
def _(x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    return None


@fake(silu_mul_out)
def _(gate_up: Tensor, out: Tensor) -> None:
    return None


@fake(place_write_out)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    placement: str,
    eps: float,
    temper: Tensor | None,
    out: Tensor,
) -> None:
    return None


on_cuda(rms_norm_out, "norm")
on_cuda(add_rms_norm_out, "norm")
on_cuda(silu_mul_out, "gate")
on_cuda(place_write_out, "place")
