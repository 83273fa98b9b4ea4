"""Causal attention inside each of many documents that lie back to back, on a CPU: no mask, and no work between documents.

A mask of S x S costs its own memory and all products of the row, those between documents included. The native library does all
documents in one call (`herd.kernels.passages`: float32 and bfloat16, heads of whole 16s). Otherwise each document is one call of
torch's fused kernel, or all are one call where they are equally long (a row each, in pretraining on long texts).

Letters: T positions of all rows, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from herd.kernels import passages
from herd.kernels.ops import fake, gradient, operation

__all__ = ["document_attention", "document_attention_plain"]


def document_attention_plain(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
    """What `document_attention` gives first, with a mask: the definition."""
    document = first.cumsum(0)
    at = torch.arange(len(first), device=first.device)
    mask = (document[:, None] == document[None]) & (at[None] <= at[:, None])
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    return out.transpose(0, 1)


@operation()
def document_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax(q k^T / sqrt(Dh)) v over earlier positions of the same document [T, H, Dh], its log-sums [T, H], float32
    at least).

    q [T, H, Dh], k and v [T, Hkv, Dh], one float dtype; `first` [T] bool: where a document begins, the first position included.
    Its shape does not depend on the documents, so compiled code meets one shape. Differentiable in q, k, v (not in the log-sums).
    """
    if passages.takes(q):
        return passages.attend(q, k, v, first)
    out, sums = torch.empty_like(q), q.new_zeros(q.shape[:2], dtype=_wide(q))
    for rows, shape in _spans(first):
        parts = [_heads_first(x[rows], shape) for x in (q, k, v)]
        if shape[1] == 1:
            repeated = v[rows].repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[rows] = repeated
            continue
        some, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, True)
        out[rows] = some.transpose(1, 2).flatten(0, 1)
        sums[rows] = logs.transpose(1, 2).flatten(0, 1)
    return out, sums


@fake(document_attention)
def _(q, k, v, first):
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=_wide(q))


@operation()
def document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v."""
    if passages.takes(q):
        return passages.attend_backward(grad, q, k, v, out, sums, first)
    by_q, by_k, by_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, shape in _spans(first):
        if shape[1] == 1:
            by_q[rows], by_k[rows] = 0, 0
            by_v[rows] = grad[rows].unflatten(1, (v.shape[1], -1)).sum(2)
            continue
        parts = [_heads_first(x[rows], shape) for x in (grad, q, k, v, out)]
        logs = sums[rows].unflatten(0, shape).transpose(1, 2)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, logs, 0.0, True)
        for into, part in zip((by_q, by_k, by_v), found, strict=True):
            into[rows] = part.transpose(1, 2).flatten(0, 1)
    return by_q, by_k, by_v


@fake(document_attention_backward)
def _(grad, q, k, v, out, sums, first):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """[documents * length, heads, Dh] -> [documents, heads, length, Dh]."""
    return x.unflatten(0, shape).transpose(1, 2)


def _spans(first: Tensor) -> Iterator[tuple[slice, tuple[int, int]]]:
    """(positions, (documents, length of each)): neighbours of one length together, such as padding of one position each."""
    starts = first.nonzero().flatten().tolist()
    assert starts[:1] == [0], "the first position begins a document"
    ends = [*starts[1:], len(first)]
    at = 0
    while at < len(starts):
        length, begin = ends[at] - starts[at], starts[at]
        count = 1
        while at + count < len(starts) and ends[at + count] - starts[at + count] == length:
            count += 1
        yield slice(begin, begin + count * length), (count, length)
        at += count


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


@gradient(document_attention, saved=_setup)
def _(ctx, grad: Tensor, _sums: Tensor):
    q, k, v, first, out, sums = ctx.saved_tensors
    return *document_attention_backward(grad.contiguous(), q, k, v, out, sums, first), None
