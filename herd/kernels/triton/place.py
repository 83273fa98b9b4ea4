"""Queries and keys placed (every way of `herd.model.rope`), keys and values written to the cache: one launch a layer.

A program has one row and a few heads: of the queries, of the keys, or of the values.
"""

# pyright: reportCallIssue=false, reportAssignmentType=false
# A launch takes options that no kernel has as parameters.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from herd.kernels.triton.launch import device_of, power

__all__ = ["place_kernel", "place_write_out"]

HEADS = 4
"""Of a program: with the 48 heads of an 8B model, one row is 12 programs."""

TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 of small magnitude is rounded half to even by adding and subtracting it."""


@triton.jit
def place_kernel(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    temper,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    out,
    q_stride,
    k_stride,
    v_stride,
    out_stride,
    eps,
    H: tl.constexpr,
    HKV: tl.constexpr,
    DH: tl.constexpr,
    DH_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PLACEMENT: tl.constexpr,
    INT8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (H + HEADS - 1) // HEADS
    key_parts: tl.constexpr = (HKV + HEADS - 1) // HEADS
    if part < query_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        x = _placed(q + row * q_stride, head, H, cos, sin, temper, row, eps, True, DH, DH_BLOCK, HEADS, PLACEMENT)
        d = tl.arange(0, DH_BLOCK)
        at = out + row * out_stride + head[:, None] * DH + d[None, :]
        tl.store(at, x, (head < H)[:, None] & (d < DH)[None, :])
    else:
        slot = tl.load(slots + row)
        if slot >= 0:
            if part < query_parts + key_parts:
                head = (part - query_parts) * HEADS + tl.arange(0, HEADS)
                x = _placed(
                    k + row * k_stride, head, HKV, cos, sin, temper, row, eps, False, DH, DH_BLOCK, HEADS, PLACEMENT
                )
                _write(x, head, slot, k_cache, k_scale, HKV, DH, DH_BLOCK, INT8)
            else:
                head = (part - query_parts - key_parts) * HEADS + tl.arange(0, HEADS)
                x = _heads(v + row * v_stride, head, HKV, DH, DH_BLOCK)
                _write(x, head, slot, v_cache, v_scale, HKV, DH, DH_BLOCK, INT8)


@triton.jit
def _heads(x, head, N: tl.constexpr, DH: tl.constexpr, DH_BLOCK: tl.constexpr):
    """[HEADS, DH_BLOCK] of a row."""
    d = tl.arange(0, DH_BLOCK)
    return tl.load(x + head[:, None] * DH + d[None, :], (head < N)[:, None] & (d < DH)[None, :], 0.0)


@triton.jit
def _placed(
    x,
    head,
    N: tl.constexpr,
    cos,
    sin,
    temper,
    row,
    eps,
    QUERY: tl.constexpr,
    DH: tl.constexpr,
    DH_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PLACEMENT: tl.constexpr,
):
    x = _heads(x, head, N, DH, DH_BLOCK)
    if PLACEMENT == "rope" or PLACEMENT == "rope_norm":
        half = tl.arange(0, DH_BLOCK // 2)
        c = tl.load(cos + row * (DH // 2) + half, half < DH // 2, 0.0)[None, :]
        s = tl.load(sin + row * (DH // 2) + half, half < DH // 2, 0.0)[None, :]
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (HEADS, DH_BLOCK // 2, 2)))
        turned = tl.join(even * c - odd * s, even * s + odd * c)
        x = tl.reshape(turned, (HEADS, DH_BLOCK)).to(x.dtype)
    if PLACEMENT == "rope_norm":
        wide = x.to(tl.float32)
        x = (wide * tl.rsqrt(tl.sum(wide * wide, 1) / DH + eps)[:, None]).to(x.dtype)
    if QUERY and PLACEMENT == "tempered":
        x = (x.to(tl.float32) * tl.load(temper + row)).to(x.dtype)
    return x


@triton.jit
def _write(
    x, head, slot, cache, scales, HKV: tl.constexpr, DH: tl.constexpr, DH_BLOCK: tl.constexpr, INT8: tl.constexpr
):
    d = tl.arange(0, DH_BLOCK)
    place = slot * HKV + head
    inside = (head < HKV)[:, None] & (d < DH)[None, :]
    if INT8:
        wide = x.to(tl.float32)
        # The sum is zero, or NaN where a number is not finite: tl.max alone would not tell.
        scale = tl.div_rn(tl.max(tl.abs(wide), 1), 127.0) + tl.sum(wide * 0.0, 1)
        steps = tl.div_rn(wide, tl.broadcast_to(tl.where(scale == 0.0, 1.0, scale)[:, None], wide.shape))
        steps = tl.where(steps == steps, steps, 0.0)  # the code of a NaN is of no importance: its scale is one
        steps = tl.clamp(steps, -127.0, 127.0) + TO_INTEGER - TO_INTEGER
        x = steps.to(tl.int8)
        tl.store(scales + place, scale, head < HKV)
    tl.store(cache + place[:, None] * DH + d[None, :], x.to(cache.dtype.element_ty), inside)


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
    """See herd.kernels.fused.place_write."""
    rows, heads, width = q.shape
    kv_heads = k.shape[1]
    for tensor in (q, k, v, out):
        assert tensor.stride()[1:] == (width, 1)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    few = min(HEADS, power(kv_heads))
    parts = triton.cdiv(heads, few) + 2 * triton.cdiv(kv_heads, few)
    with device_of(q):
        place_kernel[(rows, parts)](
            q,
            k,
            v,
            cos,
            sin,
            slots,
            cos if temper is None else temper,
            k_cache,
            v_cache,
            cos if k_scale is None else k_scale,
            cos if v_scale is None else v_scale,
            out,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            out.stride(0),
            eps,
            H=heads,
            HKV=kv_heads,
            DH=width,
            DH_BLOCK=power(width),
            HEADS=few,
            PLACEMENT=placement,
            INT8=k_scale is not None,
            num_warps=1,
        )
