"""Attention of single rows over a paged cache (decoding): keys are read in parts at once, and the parts merged.

A program has one row, one key head with all query heads that share it, and one part of the row's keys: each key and value is
read once. What it leaves is the part's result and the logarithm of its weight; a second, small kernel adds the parts in order.
"""

# pyright: reportCallIssue=false, reportAssignmentType=false
# A launch takes options that no kernel has as parameters.
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from herd.kernels.triton.launch import device_of, power

__all__ = ["decode_attention_out", "decode_kernel", "keys_at_once", "merge_kernel"]

LOG2_E = 1.4426950408889634


@triton.jit
def decode_kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    positions,
    tables,
    owners,
    partial,
    weights,
    out,
    q_stride,
    out_stride,
    table_stride,
    chunk,
    softmax_scale,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DH: tl.constexpr,
    DH_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNKED: tl.constexpr,
    INT8: tl.constexpr,
    OWNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)
    owner = row
    if OWNED:
        owner = tl.load(owners + row).to(tl.int64)
    first = 0
    if CHUNKED:
        first = tl.maximum(position, 0) // chunk * chunk
    part = tl.cdiv(tl.cdiv(position + 1 - first, SPLITS), KEYS) * KEYS
    start = first + split * part
    stop = tl.minimum(start + part, position + 1)

    g = tl.arange(0, GROUP_BLOCK)
    d = tl.arange(0, DH_BLOCK)
    heads = head * GROUP + g
    mine = (g < GROUP)[:, None] & (d < DH)[None, :]
    queries = tl.load(q + row * q_stride + heads[:, None] * DH + d[None, :], mine, 0.0)
    largest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    sums = tl.zeros([GROUP_BLOCK, DH_BLOCK], tl.float32)
    for at in range(start, stop, KEYS):
        n = at + tl.arange(0, KEYS)
        seen = n < stop
        block = tl.load(tables + owner * table_stride + n // BLOCK_SIZE, seen, 0).to(tl.int64)
        place = (block * BLOCK_SIZE + n % BLOCK_SIZE) * HKV + head
        inside = seen[:, None] & (d < DH)[None, :]
        keys = tl.load(k_cache + place[:, None] * DH + d[None, :], inside, 0.0).to(queries.dtype)
        values = tl.load(v_cache + place[:, None] * DH + d[None, :], inside, 0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * softmax_scale
        if INT8:
            scores = scores * tl.load(k_scale + place, seen, 0.0)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        faded = tl.exp2(largest - higher)
        chances = tl.exp2(scores - higher[:, None])
        total = total * faded + tl.sum(chances, 1)
        if INT8:
            chances = chances * tl.load(v_scale + place, seen, 0.0)[None, :]
        sums = sums * faded[:, None] + tl.dot(chances.to(values.dtype), values, input_precision="ieee")
        largest = higher
    total = tl.where(total == 0.0, 1.0, total)  # of a part without keys: its weight stays minus infinity
    sums = sums / total[:, None]
    if SPLITS == 1:
        tl.store(out + row * out_stride + heads[:, None] * DH + d[None, :], sums.to(out.dtype.element_ty), mine)
    else:
        place = (row * (HKV * GROUP) + heads) * SPLITS + split
        tl.store(partial + place[:, None] * DH + d[None, :], sums, mine)
        tl.store(weights + place, largest + tl.log2(total), g < GROUP)


@triton.jit
def merge_kernel(
    partial,
    weights,
    out,
    out_stride,
    H: tl.constexpr,
    DH: tl.constexpr,
    DH_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, SPLIT_BLOCK)
    d = tl.arange(0, DH_BLOCK)
    place = (row * H + head) * SPLITS + s
    weight = tl.load(weights + place, s < SPLITS, float("-inf"))
    used = weight != float("-inf")  # a NaN is used, so that it is seen
    top = tl.max(weight, 0)
    share = tl.where(used, tl.exp2(weight - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    parts = tl.load(partial + place[:, None] * DH + d[None, :], used[:, None] & (d < DH)[None, :], 0.0)
    whole = tl.sum(share, 0)
    result = tl.sum(parts * share[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * out_stride + head * DH + d, result.to(out.dtype.element_ty), d < DH)


def keys_at_once(width: int, dtype_bytes: int) -> int:
    """Keys of an iteration: 16 KiB of keys and as many of values, of which three iterations are in flight."""
    return 64 if width * dtype_bytes >= 256 else 128


def decode_attention_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    tables: Tensor,
    chunk: int | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    owners: Tensor | None,
    splits: int,
    scratch: Tensor,
    out: Tensor,
) -> None:
    """See herd.kernels.paged.decode_attention."""
    rows, heads, width = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    assert q.stride()[1:] == out.stride()[1:] == (width, 1)
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert tables.stride(1) == 1
    count = rows * heads * splits
    assert splits == 1 or scratch.numel() >= count * (width + 1)
    partial, weights = (scratch, scratch) if splits == 1 else (scratch, scratch[count * width :])
    with device_of(q):
        decode_kernel[(rows, kv_heads, splits)](
            q,
            k_cache,
            v_cache,
            weights if k_scale is None else k_scale,
            weights if v_scale is None else v_scale,
            positions,
            tables,
            positions if owners is None else owners,
            partial,
            weights,
            out,
            q.stride(0),
            out.stride(0),
            tables.stride(0),
            chunk or 1,
            LOG2_E / math.sqrt(width),
            HKV=kv_heads,
            GROUP=group,
            GROUP_BLOCK=power(group, 16),
            DH=width,
            DH_BLOCK=power(width, 16),
            BLOCK_SIZE=block_size,
            SPLITS=splits,
            KEYS=keys_at_once(width, k_cache.element_size()),
            CHUNKED=chunk is not None,
            INT8=k_scale is not None,
            OWNED=owners is not None,
            num_warps=4,
            num_stages=3,
        )
        if splits > 1:
            merge_kernel[(rows, heads)](
                partial,
                weights,
                out,
                out.stride(0),
                H=heads,
                DH=width,
                DH_BLOCK=power(width),
                SPLITS=splits,
                SPLIT_BLOCK=power(splits),
                num_warps=4,
            )
