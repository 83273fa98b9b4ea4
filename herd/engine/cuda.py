"""The operations of a GPU step, all of them in one place: herd's Triton kernels where they run, plain torch where not.

The plain forms here take nothing back to the host and have no shape that depends on a number, so that they can be recorded like
the kernels can (`prompt_attention` apart, whose spans lie in main memory). They are what a GPU without Triton runs, and how the
steps are tested on a CPU.

Letters: T rows, D dim, H query heads, Hkv key/value heads, Dh head_dim, F inner width, E experts, k of them per row, W blocks of
a table.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, scaled_dot_product_attention, silu

from herd.engine.paged import Layer
from herd.kernels import triton
from herd.kernels.packed import Packed
from herd.kernels.paged import dequantize_rows, write_kv, write_kv_int8
from herd.kernels.products import expert_product
from herd.model.config import LayerSpec
from herd.model.moe import MoE
from herd.model.norm import rms
from herd.model.rope import Rotary, rotate

__all__ = [
    "ExpertWeights",
    "Places",
    "Span",
    "add_norm",
    "decode_attention",
    "place_write",
    "prompt_attention",
    "routed",
    "silu_mul",
]

LONG = 128
"""Rows of a prompt from which on its keys are gathered for torch's fused attention: the fastest one over long rows of neighbours.
Shorter ones are read where they lie."""

ExpertWeights = tuple[Packed, Packed, Packed]
"""w1, w2, w3 of all experts of a layer, stacked."""

Span = tuple[int, int, int, int]
"""(first row, rows, first position, table), as in `herd.engine.pack`."""


class Places(NamedTuple):
    """Where the rows of a step stand: cos and sin [T, Dh / 2] float32, temper [T] float32 where some layer is tempered."""

    cos: Tensor
    sin: Tensor
    temper: Tensor | None


@cache
def _say_missing(why: str) -> None:
    warnings.warn(f"herd's GPU kernels are not used: {why}", stacklevel=4)


def kernels_for(x: Tensor) -> bool:
    """Whether the kernels run on `x`; where they are missing on a GPU that is said once."""
    if not x.is_cuda:
        return False
    if (why := triton.missing()) is not None:
        _say_missing(why)
    return why is None


def add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + more, its RMS norm times `weight`), all [T, D] in x's dtype; `more` None adds nothing. May change x in place."""
    if kernels_for(x):
        from herd.kernels import fused

        return x, fused.rms_norm(x, weight, eps) if more is None else fused.add_rms_norm(x, more, weight, eps)
    x = x if more is None else x + more
    return x, rms(x, eps) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2F], gates first -> [T, F]."""
    if kernels_for(gate_up):
        from herd.kernels import fused

        return fused.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def place_write(
    q: Tensor, k: Tensor, v: Tensor, places: Places, slots: Tensor, layer: Layer, spec: LayerSpec, eps: float
) -> Tensor:
    """Place q [T, H, Dh] and k [T, Hkv, Dh] as `spec` says, put k and v into `slots` [T] of the cache; q, placed."""
    if kernels_for(q):
        from herd.kernels import fused

        return fused.place_write(
            q, k, v, places.cos, places.sin, slots, *layer, placement=spec.placement, eps=eps, temper=places.temper
        )
    if spec.placement in ("rope", "rope_norm"):
        rotary = Rotary(places.cos[:, None], places.sin[:, None], slots)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if spec.placement == "rope_norm":
            q, k = rms(q, eps), rms(k, eps)
    elif spec.placement == "tempered":
        assert places.temper is not None
        q = (q * places.temper[:, None, None]).type_as(q)
    if layer.k_scale is None or layer.v_scale is None:
        write_kv(k, v, layer.k, layer.v, slots)
    else:
        write_kv_int8(k, v, layer.k, layer.v, layer.k_scale, layer.v_scale, slots)
    return q


def decode_attention(q: Tensor, layer: Layer, positions: Tensor, tables: Tensor, chunk: int | None) -> Tensor:
    """Attention of one query per sequence, q [T, H, Dh] at `positions` [T], over the blocks `tables` [T, W] -> [T, H, Dh].

    Its own key is in the cache already. What lies in a block behind the position has no influence, whatever it is.
    """
    if kernels_for(q):
        from herd.kernels import paged

        return paged.decode_attention(q, layer.k, layer.v, positions, tables, chunk, layer.k_scale, layer.v_scale)
    k, v = _gather(layer.k, layer.k_scale, tables, q.dtype), _gather(layer.v, layer.v_scale, tables, q.dtype)
    at = torch.arange(k.shape[1], device=q.device)
    seen = at <= positions[:, None]
    if chunk is not None:
        seen = seen & (at >= (positions // chunk * chunk)[:, None])
    hidden = ~seen[..., None, None]
    k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)  # 0 times what a damaged request left there is not 0
    # The heads that share a key stand in for positions, so that it is read once.
    grouped = q.unflatten(1, (k.shape[2], -1))
    out = scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), seen[:, None, None])
    return out.flatten(1, 2)


def prompt_attention(
    q: Tensor, layer: Layer, spans: Sequence[Span], on_device: Tensor, tables: Tensor, chunk: int | None
) -> Tensor:
    """Attention of the rows of `spans`, in main memory and `on_device` [n, 4] -> [T, H, Dh]; rows of no span are zero."""
    fits = layer.k.dtype == q.dtype and q.dtype != torch.float32
    if kernels_for(q) and not (fits and min(rows for _, rows, _, _ in spans) >= LONG):
        from herd.kernels import paged

        return paged.span_attention(q, layer.k, layer.v, on_device, tables, chunk, layer.k_scale, layer.v_scale)
    out = torch.zeros_like(q)
    size = layer.k.shape[1]
    for row, rows, position, table in spans:
        # Pieces that lie in one chunk each see all that is before them in it: no mask is needed.
        for start, stop in _pieces(position, rows, chunk):
            first = 0 if chunk is None else start // chunk * chunk
            blocks = tables[table : table + 1, first // size : -(-stop // size)]
            inside = slice(first % size, first % size + stop - first)
            k = _gather(layer.k, layer.k_scale, blocks, q.dtype)[0, inside].transpose(0, 1)
            v = _gather(layer.v, layer.v_scale, blocks, q.dtype)[0, inside].transpose(0, 1)
            mine = slice(row + start - position, row + stop - position)
            out[mine] = _causal(q[mine].transpose(0, 1), k, v).transpose(0, 1)
    return out


def _pieces(position: int, rows: int, chunk: int | None) -> list[tuple[int, int]]:
    """Positions `position` .. + rows, cut where chunks begin."""
    stop = position + rows
    if chunk is None:
        return [(position, stop)]
    cuts = [position, *range((position // chunk + 1) * chunk, stop, chunk), stop]
    return list(pairwise(cuts))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [H, rows, Dh], the last rows of k and v [Hkv, keys, Dh] -> [H, rows, Dh]."""
    grouped = q.shape[0] != k.shape[0]
    if q.shape[1] == 1:  # all keys are visible
        heads = q.unflatten(0, (k.shape[0], -1)).squeeze(2)
        return scaled_dot_product_attention(heads[None], k[None], v[None])[0].flatten(0, 1)[:, None]
    if q.shape[1] == k.shape[1]:
        return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=grouped)[0]
    from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler: seconds that a CPU need not pay

    mask = causal_lower_right(q.shape[1], k.shape[1])
    return scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=grouped)[0]  # type: ignore[arg-type]


def _gather(cache: Tensor, scale: Tensor | None, tables: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, W * block_size, Hkv, Dh] of `tables` [T, W]."""
    values = cache[tables].flatten(1, 2)
    return values.to(dtype) if scale is None else dequantize_rows(values, scale[tables].flatten(1, 2), dtype)


def routed(moe: MoE, experts: ExpertWeights, x: Tensor) -> Tensor:
    """What the routed experts of `moe`, whose weights are `experts`, add for x [T, D], without the shared one -> [T, D]."""
    w1, w2, w3 = experts
    scores, chosen = moe.router(x).topk(moe.top_k, dim=-1)
    scores = scores.float().sigmoid().type_as(x)
    scaled = (x[:, None] * scores[..., None]).flatten(0, 1)  # [T * k, D]
    picked = chosen.flatten()
    order = picked.argsort(stable=True)
    counts = torch.zeros(moe.n_experts, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, picked, torch.ones_like(picked))
    rows = scaled[order]
    down = _grouped(silu(_grouped(rows, w1, counts)) * _grouped(rows, w3, counts), w2, counts)
    out = torch.empty_like(down).index_copy(0, order, down)
    return out.unflatten(0, (-1, moe.top_k)).sum(1)


def _grouped(x: Tensor, weight: Packed, counts: Tensor) -> Tensor:
    """x [T, K] sorted by expert, weight [E, N, K], counts [E] int64 -> [T, N]."""
    if weight.kind == "plain" and not kernels_for(x):  # the plain form of the other asks the host for the counts
        return grouped_mm(x, weight.codes.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
    return expert_product(x, weight, counts)
