"""Grouped matrix product: rows sorted by group, one weight matrix per group (mixture of experts).

Letters: T rows, E groups, I and O inner and outer width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from herd.kernels.ops import fake, gradient, on_cuda, operation

__all__ = ["grouped_linear"]


@operation()
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y[t] = weight[group of t] @ x[t]. x [T, I] sorted by group, weight [E, O, I], counts [E] int64 summing to T -> [T, O].

    An opaque op, since group sizes are data: traced code sees one call with static shapes. Differentiable in x and weight.
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    for e, start, stop in _spans(counts, x.shape[0]):
        torch.mm(x[start:stop], weight[e].T, out=out[start:stop])
    return out


@fake(grouped_linear)
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@operation()
def grouped_outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """sum over the rows of each group of y[t] x[t]^T. y [T, O], x [T, I], counts [E] -> [E, O, I]: the weight's gradient."""
    out = x.new_zeros(counts.shape[0], y.shape[1], x.shape[1])
    for e, start, stop in _spans(counts, x.shape[0]):
        torch.mm(y[start:stop].T, x[start:stop], out=out[e])
    return out


@fake(grouped_outer)
def _(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], y.shape[1], x.shape[1])


def _spans(counts: Tensor, rows: int) -> list[tuple[int, int, int]]:
    """(group, first row, last row + 1) of every group that has rows; together they are all `rows`."""
    spans, start = [], 0
    for e, n in enumerate(counts.tolist()):
        if n:
            spans.append((e, start, start + n))
        start += n
    assert start == rows, f"counts add up to {start} of {rows} rows"
    return spans


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


@gradient(grouped_linear, saved=_setup)
def _(ctx, grad: Tensor):
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grouped_linear(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_outer(grad, x, counts) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


@gradient(grouped_outer, saved=_setup)
def _(ctx, grad: Tensor):
    y, x, counts = ctx.saved_tensors
    grad = grad.contiguous()
    grad_y = grouped_linear(x, grad, counts) if ctx.needs_input_grad[0] else None
    grad_x = grouped_linear(y, grad.transpose(1, 2), counts) if ctx.needs_input_grad[1] else None
    return grad_y, grad_x, None


on_cuda(grouped_linear, "product")
