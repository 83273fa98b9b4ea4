"""Attention over keys and values that lie in blocks: the plain torch operations, slow and right, that define faster kernels.

They are traced as single operations: what they loop over is data. A cache is [blocks, block_size, Hkv, Dh]; slot s is position
s % block_size of block s // block_size. An int8 cache has a float32 scale per position and head, [blocks, block_size, Hkv].

Letters: T rows, H query heads, Hkv key/value heads, Dh head_dim, n spans.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from herd.kernels.ops import fake, on_cuda, operation

__all__ = [
    "decode_attention",
    "decode_scratch",
    "decode_splits",
    "dequantize_rows",
    "paged_attention",
    "quantize_rows",
    "span_attention",
    "write_kv",
    "write_kv_int8",
]

FIXED_SPLITS = 16
"""Parts that keys are read in where a row's bits must not depend on the company it is in."""

CORES = 132
"""Multiprocessors of the GPU that grids are sized for (H100, H200). Others get a little more or less work than is best."""

PER_CORE = 2
"""Parts of keys that one multiprocessor works on at a time."""

SHORTEST_PART = 128
"""Keys: below, merging parts costs more than reading them one after the other."""

MOST_SPLITS = 64

LEVELS = 127
"""An int8 value v stands for v * scale, and the largest of a head for plus or minus 127."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., Dh] -> int8 [..., Dh] and float32 scales [...]: symmetric, by the largest magnitude, rounded half to even."""
    x = x.float()
    scale = x.abs().amax(-1) / LEVELS
    return (x / scale.where(scale > 0, 1)[..., None]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def dequantize_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: int8 [..., Dh] and scales [...] -> `dtype`."""
    return (x.float() * scale[..., None]).to(dtype)


@operation(mutates=("k_cache", "v_cache"))
def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Put the keys and values k, v [T, Hkv, Dh] into their `slots` [T] int64, in the cache's dtype."""
    k_cache.flatten(0, 1).index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.flatten(0, 1).index_copy_(0, slots, v.to(v_cache.dtype))


@operation(mutates=("k_cache", "v_cache", "k_scale", "v_scale"))
def write_kv_int8(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, slots: Tensor
) -> None:
    """The same into an int8 cache, quantized by `quantize_rows`."""
    for new, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        values, scale = quantize_rows(new)
        cache.flatten(0, 1).index_copy_(0, slots, values)
        scales.flatten(0, 1).index_copy_(0, slots, scale)


@operation()
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
    """Causal attention of q [T, H, Dh] over the blocks of each row's sequence -> [T, H, Dh].

    spans [n, 4] int64 and tables [n, width] int32 as in `herd.engine.pack`: the rows of a span are neighbouring positions of one
    sequence, whose own keys are in the cache already. With `chunk`, a position sees only those in its own chunk of so many
    positions. The scales belong to an int8 cache. A span is computed as if it were alone.
    """
    return _attend_spans(q, k_cache, v_cache, spans, tables, chunk, k_scale, v_scale)


def decode_splits(rows: int, n_kv_heads: int, longest: int, *, fixed: bool = False) -> int:
    """In how many parts `decode_attention` reads the keys of a row, for steps of up to `rows` rows of up to `longest` keys.

    Enough to give every core of a large GPU work, while parts stay long enough to be worth a merge. `fixed`: the same number
    whatever the step, so that a row's result depends on nothing but its own keys.
    """
    if fixed:
        return FIXED_SPLITS
    wanted = -(-CORES * PER_CORE // (rows * n_kv_heads))
    return max(1, min(wanted, -(-longest // SHORTEST_PART), MOST_SPLITS))


def decode_scratch(rows: int, n_heads: int, head_dim: int, splits: int, device: torch.device | str) -> Tensor:
    """Working memory for `decode_attention`: float32, what each part of the keys gives for each row and head."""
    return torch.empty(rows * n_heads * splits * (head_dim + 1), dtype=torch.float32, device=device)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    tables: Tensor,
    chunk: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    owners: Tensor | None = None,
    splits: int | None = None,
    scratch: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of single rows, each over the blocks of its sequence: q [T, H, Dh] (rows may lie apart) -> [T, H, Dh].

    Row t is at positions[t] (int64) of the sequence whose blocks are tables[owners[t]] (owners [T] int64; None: tables[t]) and
    sees the keys up to its own, in its `chunk`. A row at a negative position is idle, and its result is zeros. On a GPU keys
    are read in `splits` parts at once (`decode_splits`), whose results meet in `scratch` (`decode_scratch`, or larger).
    """
    rows, heads, width = q.shape
    if splits is None:
        splits = decode_splits(rows, k_cache.shape[2], tables.shape[1] * k_cache.shape[1])
    if scratch is None:
        scratch = decode_scratch(rows, heads, width, splits if q.is_cuda else 0, q.device)
    out = q.new_empty(q.shape) if out is None else out
    decode_attention_out(q, k_cache, v_cache, positions, tables, chunk, k_scale, v_scale, owners, splits, scratch, out)
    return out


def span_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    spans: Tensor,
    tables: Tensor,
    chunk: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_attention` into `out`; rows of no span are left as they are. For prompts: keys are read in one part."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out
    span_attention_out(q, k_cache, v_cache, spans, tables, chunk, k_scale, v_scale, out)
    return out


@operation(mutates=("scratch", "out"))
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
    """See decode_attention."""
    owner = range(len(q)) if owners is None else owners.tolist()
    spans = [(row, int(at >= 0), max(at, 0), owner[row]) for row, at in enumerate(positions.tolist())]
    at = torch.tensor(spans, dtype=torch.int64).view(-1, 4)
    out.copy_(_attend_spans(q, k_cache, v_cache, at, tables, chunk, k_scale, v_scale))


@operation(mutates=("out",))
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
    """See span_attention."""
    new = _attend_spans(q, k_cache, v_cache, spans, tables, chunk, k_scale, v_scale)
    for row, rows, _, _ in spans.tolist():
        out[row : row + rows] = new[row : row + rows]


def _attend_spans(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    spans: Tensor,
    tables: Tensor,
    chunk: int | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """See paged_attention."""
    out = torch.zeros_like(q)
    size = k_cache.shape[1]
    for row, rows, position, table in spans.tolist():
        if not rows:
            continue
        first = 0 if chunk is None else position // chunk * chunk
        blocks = tables[table, first // size : -(-(position + rows) // size)]
        inside = slice(first % size, first % size + position + rows - first)
        k = _gather(k_cache, k_scale, blocks, q.dtype)[inside]
        v = _gather(v_cache, v_scale, blocks, q.dtype)[inside]
        out[row : row + rows] = _attend(q[row : row + rows], k, v, position, first, chunk)
    return out


def _gather(cache: Tensor, scale: Tensor | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """[positions, Hkv, Dh] of `blocks`."""
    values = cache[blocks].flatten(0, 1)
    return values.to(dtype) if scale is None else dequantize_rows(values, scale[blocks].flatten(0, 1), dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, position: int, first: int, chunk: int | None) -> Tensor:
    """One span: q [rows, H, Dh] from `position` on, k and v [K, Hkv, Dh] from `first` on."""
    rows, keys = q.shape[0], k.shape[0]
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if rows == 1:  # all keys are visible; the heads that share a key stand in for positions, so that it is read once
        out = scaled_dot_product_attention(q.unflatten(0, (k.shape[0], -1)).squeeze(2)[None], k[None], v[None])
        return out[0].flatten(0, 1)[None]
    grouped = q.shape[0] != k.shape[0]
    if rows == keys and (chunk is None or rows <= chunk):  # no key before the span's own: a plain causal square
        out = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=grouped)
        return out[0].transpose(0, 1)
    at = torch.arange(position, position + rows, device=q.device)[:, None]
    seen = torch.arange(first, first + keys, device=q.device)[None]
    mask = seen <= at
    if chunk is not None:
        mask = mask & (seen // chunk == at // chunk)
    return scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=grouped)[0].transpose(0, 1)


@fake(write_kv)
def _(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    return None


@fake(write_kv_int8)
def _(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, slots: Tensor) -> None:
    return None


@fake(paged_attention)
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    spans: Tensor,
    tables: Tensor,
    chunk: int | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(q)


@fake(decode_attention_out)
def _(
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
    return None


@fake(span_attention_out)
def _(
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
    return None


on_cuda(paged_attention, "prefill")
on_cuda(span_attention_out, "prefill")
on_cuda(decode_attention_out, "attention")
