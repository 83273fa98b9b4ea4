"""Cross-entropy over logits that are cut along the vocabulary: three numbers a token are exchanged, never logits.

Letters: T tokens, V vocabulary, n ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["nll_sum"]


def nll_sum(logits: DTensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """Sum over tokens of -log p(label), in fp32 nats, the same on all ranks. logits [T, V] cut along V, labels [T] whole."""
    mesh = logits.device_mesh
    rows = -(-logits.shape[-1] // mesh.size())  # as DTensor cuts: the last ranks may have less
    local = logits.to_local().float()
    summed: Any = _Nll.apply(local, labels, ignore, mesh.get_local_rank() * rows, mesh.get_group())
    return summed


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, logits: Tensor, labels: Tensor, ignore: int, first: int, group: dist.ProcessGroup
    ) -> Tensor:
        learned = labels != ignore
        own = labels - first
        inside = learned & (own >= 0) & (own < logits.shape[-1])
        index = torch.where(inside, own, 0)[:, None]
        low = torch.finfo(logits.dtype).min
        most = logits.amax(-1) if logits.shape[-1] else logits.new_full(labels.shape, low)
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
        shares = (logits - most[:, None]).exp()
        picked = logits.gather(1, index)[:, 0] * inside if logits.shape[-1] else torch.zeros_like(most)
        sums = torch.stack([shares.sum(-1), picked])
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(shares / sums[0][:, None], index, inside, learned)
        return ((sums[0].log() + most - sums[1]) * learned).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        shares, index, inside, learned = ctx.saved_tensors
        made = shares * learned[:, None]
        if made.shape[-1]:
            made.scatter_add_(1, index, -inside[:, None].to(made.dtype))
        return made * gradient, None, None, None, None
