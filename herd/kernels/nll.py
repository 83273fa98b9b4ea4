"""Output projection and cross-entropy as one operation, with its gradients made on the way: no tensor of T x V ever exists.

A chunk of logits becomes its own gradient in place, and that is multiplied into the gradients of hidden states and weight before
the next chunk is made. So every product is made once, where recomputing chunks in the backward pass makes one of three twice.

Letters: T positions, D dim, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from herd.kernels import dense, onepass
from herd.kernels.ops import fake, operation

__all__ = ["linear_nll", "linear_nll_plain"]


def linear_nll_plain(hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """What `linear_nll` sums, with all logits at once: the definition."""
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")


@operation()
def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int, chunk: int, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of -log p(label) float32, its gradient by hidden [T, D], by weight [V, D]); those not wanted are empty.

    hidden [T, D] and weight [V, D] of any float dtypes: products are made in hidden's, everything after them in float32, and the
    gradient of the weight is added up over chunks in float32. Rows whose label is `ignored` cost nothing. At once there are, of
    logits, C x V in hidden's dtype (of 16 bits without the native library: also C x V in float32); beside them V x D in hidden's
    dtype when the weight has another, and V x D in float32 when the weight's gradient is wanted.
    """
    kept = (labels != ignored).nonzero().squeeze(1)
    every = len(kept) == len(labels)
    rows = hidden if every else hidden[kept]
    targets = labels if every else labels[kept]
    matrix = weight.to(hidden.dtype)
    wide = hidden.dtype == torch.float32
    chunk = min(chunk, len(rows))
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    by_rows = torch.empty_like(rows) if for_hidden else hidden.new_empty(0)
    by_weight = hidden.new_empty(weight.shape if for_weight else 0, dtype=torch.float32)
    if for_weight and (not wide or len(rows) == 0):
        by_weight.zero_()
    native = onepass.takes(hidden.new_empty(1, len(weight)))
    narrow = hidden.new_empty(chunk, len(weight))
    room = narrow if wide or native else hidden.new_empty(chunk, len(weight), dtype=torch.float32)
    for start in range(0, len(rows), max(1, chunk)):
        part, wanted = rows[start : start + chunk], targets[start : start + chunk]
        small, logits = narrow[: len(part)], room[: len(part)]
        dense.product(part, matrix, small)
        total += (_learned_natively if native else _learned)(small, logits, wanted, for_hidden or for_weight)
        if for_hidden:
            dense.multiply(small, matrix, by_rows[start : start + chunk])
        if for_weight and wide:
            dense.multiply(small.T, part, by_weight, add=start > 0)
        elif for_weight:
            by_weight += small.T @ part
    if for_hidden and not every:
        by_rows = torch.zeros_like(hidden).index_copy_(0, kept, by_rows)
    return total, by_rows, by_weight if weight.dtype == torch.float32 else by_weight.to(weight.dtype)


def _learned(small: Tensor, logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """The sum of losses of the logits in `small` [C, V], which become their gradient if one is wanted.

    `logits` is the same or, where that is of 16 bits, float32 of its shape to work in.
    """
    if logits is not small:
        logits.copy_(small)
    torch.log_softmax(logits, 1, out=logits)
    total = -logits.gather(1, labels[:, None]).sum()
    if gradient:
        # Not torch.softmax: on a CPU its exponential is a fast one, and gradients would be ten times less exact.
        logits.exp_().scatter_add_(1, labels[:, None], logits.new_full((len(labels), 1), -1.0))
        if logits is not small:
            small.copy_(logits)
    return total


def _learned_natively(small: Tensor, logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    return onepass.learn_rows(small, labels.contiguous(), gradient).sum()


@fake(linear_nll)
def _(hidden, weight, labels, ignored, chunk, for_hidden, for_weight):
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden) if for_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
    )
