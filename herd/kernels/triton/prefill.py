"""Attention of prompts over a paged cache: spans of neighbouring rows, each over the blocks of its own sequence.

The rows of a tile are pairs of a position and one of the query heads that share a key head, so that a tile is full whatever the
group, and a key is read once for all of them. Which tile belongs to which span is found on the device: no length is known to the
host. A row's result depends on its own keys only: a tile's other rows, and keys it may not see, change none of its bits.
"""

# pyright: reportCallIssue=false, reportAssignmentType=false
# A launch takes options that no kernel has as parameters.
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from herd.kernels.triton.attention import LOG2_E
from herd.kernels.triton.launch import device_of, hopper, power

__all__ = ["paged_attention", "span_attention_out", "span_kernel"]


@triton.jit
def span_kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    spans,
    tables,
    out,
    q_stride,
    out_stride,
    table_stride,
    n_spans,
    chunk,
    softmax_scale,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    DH: tl.constexpr,
    DH_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNKED: tl.constexpr,
    INT8: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles see most keys: they begin first
    head = tl.program_id(1)
    i = tl.arange(0, SPANS)
    lengths = tl.load(spans + i * 4 + 1, i < n_spans, 0).to(tl.int32)
    tiles = (lengths * GROUP + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, 0)
    span = tl.sum((before <= tile).to(tl.int32), 0)
    if span < n_spans:
        tile -= tl.sum(tl.where(i < span, tiles, 0), 0)
        first_row = tl.load(spans + span * 4)
        rows = tl.load(spans + span * 4 + 1).to(tl.int32)
        position = tl.load(spans + span * 4 + 2).to(tl.int32)
        table = tables + tl.load(spans + span * 4 + 3) * table_stride

        m = tile * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, DH_BLOCK)
        at = position + m // GROUP
        place = (first_row + m // GROUP)[:, None] * q_stride + (head * GROUP + m % GROUP)[:, None] * DH + d[None, :]
        mine = (m < rows * GROUP)[:, None] & (d < DH)[None, :]
        queries = tl.load(q + place, mine, 0.0)
        earliest = position + tile * ROWS // GROUP
        latest = position + tl.minimum((tile * ROWS + ROWS - 1) // GROUP, rows - 1)
        start = 0
        whole = (earliest + 1) // KEYS * KEYS  # keys that every row of the tile sees
        if CHUNKED:
            start = earliest // chunk * chunk
            whole = start + tl.maximum(tl.minimum(earliest + 1, latest // chunk * chunk + 1) - start, 0) // KEYS * KEYS
            whole = tl.where(latest // chunk == earliest // chunk, whole, start)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, DH_BLOCK], tl.float32)
        largest, total, sums = _keys(
            queries, k_cache, v_cache, k_scale, v_scale, table, head, at, start, whole, latest + 1, chunk, softmax_scale,
            largest, total, sums, HKV, DH, DH_BLOCK, BLOCK_SIZE, KEYS, CHUNKED, INT8, False,
        )  # fmt: skip
        largest, total, sums = _keys(
            queries, k_cache, v_cache, k_scale, v_scale, table, head, at, whole, latest + 1, latest + 1, chunk, softmax_scale,
            largest, total, sums, HKV, DH, DH_BLOCK, BLOCK_SIZE, KEYS, CHUNKED, INT8, True,
        )  # fmt: skip
        sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (first_row + m // GROUP)[:, None] * out_stride + (head * GROUP + m % GROUP)[:, None] * DH + d[None, :]
        tl.store(out + place, sums.to(out.dtype.element_ty), mine)


@triton.jit
def _keys(
    queries,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    table,
    head,
    at,
    start,
    stop,
    end,
    chunk,
    softmax_scale,
    largest,
    total,
    sums,
    HKV: tl.constexpr,
    DH: tl.constexpr,
    DH_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNKED: tl.constexpr,
    INT8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax over keys start .. stop - 1, of which those from `end` on do not exist, taken up where it was left."""
    d = tl.arange(0, DH_BLOCK)
    for n0 in range(start, stop, KEYS):
        n = n0 + tl.arange(0, KEYS)
        there = n < end
        block = tl.load(table + n // BLOCK_SIZE, there, 0).to(tl.int64)
        place = (block * BLOCK_SIZE + n % BLOCK_SIZE) * HKV + head
        inside = there[:, None] & (d < DH)[None, :]
        keys = tl.load(k_cache + place[:, None] * DH + d[None, :], inside, 0.0).to(queries.dtype)
        values = tl.load(v_cache + place[:, None] * DH + d[None, :], inside, 0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if INT8:
            scores = scores * tl.load(k_scale + place, there, 0.0)[None, :]
        if MASKED:
            seen = n[None, :] <= at[:, None]
            if CHUNKED:
                seen = seen & (n[None, :] // chunk == at[:, None] // chunk)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1) * softmax_scale)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        faded = tl.exp2(largest - base)
        chances = tl.exp2(scores * softmax_scale - base[:, None])
        total = total * faded + tl.sum(chances, 1)
        if INT8:
            chances = chances * tl.load(v_scale + place, there, 0.0)[None, :]
        sums = sums * faded[:, None]
        sums = tl.dot(chances.to(values.dtype), values, sums, input_precision="ieee")
        largest = higher
    return largest, total, sums


def tile_of(width: int, element_size: int, *, hopper: bool = True) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of a tile. `hopper`: compute capability 9 and later, whose matrix units read shared memory;
    earlier ones keep queries and sums in registers, and a large tile would not fit there."""
    if element_size == 4:  # float32 has no matrix units here: it is for tests
        return 32, 32, 4, 1
    if width > 128:
        return 64, 32, 4, 2
    return (128, 64, 8, 3) if hopper else (64, 32, 8, 3)


def span_attention_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    spans: Tensor,
    tables: Tensor,
    chunk: int | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
) -> None:
    """See herd.kernels.paged.span_attention."""
    rows, heads, width = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    group, count = heads // kv_heads, spans.shape[0]
    assert q.stride()[1:] == out.stride()[1:] == (width, 1)
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert spans.is_contiguous()
    assert tables.stride(1) == 1
    tile_rows, keys, warps, stages = tile_of(width, q.element_size(), hopper=hopper(q))
    with device_of(q):
        span_kernel[(rows * group // tile_rows + count, kv_heads)](
            q,
            k_cache,
            v_cache,
            spans if k_scale is None else k_scale,
            spans if v_scale is None else v_scale,
            spans,
            tables,
            out,
            q.stride(0),
            out.stride(0),
            tables.stride(0),
            count,
            chunk or 1,
            LOG2_E / math.sqrt(width),
            HKV=kv_heads,
            GROUP=group,
            DH=width,
            DH_BLOCK=power(width, 16),
            BLOCK_SIZE=block_size,
            SPANS=power(count),
            ROWS=tile_rows,
            KEYS=keys,
            CHUNKED=chunk is not None,
            INT8=k_scale is not None,
            num_warps=warps,
            num_stages=stages,
        )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    spans: Tensor,
    tables: Tensor,
    chunk: int | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See herd.kernels.paged.paged_attention."""
    out = q.new_zeros(q.shape)
    span_attention_out(q.contiguous(), k_cache, v_cache, spans, tables, chunk, k_scale, v_scale, out)
    return out
