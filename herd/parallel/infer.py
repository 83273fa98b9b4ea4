"""Tensor parallelism for running: the exchanges that make one model of the parts that several ranks hold.

Tokens are not cut: every rank has every row, which costs nothing while replies grow. Two sums a layer cross the ranks (after
attention and after the feed-forward), one more at the embedding; the logits are put together from each rank's columns. Which
numbers a rank holds is `herd.parallel.part`.

Letters: T rows, V vocabulary, v a rank's share of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from herd.model.llama import Block, Llama
from herd.parallel.part import Part

__all__ = ["Exchange", "Shared", "Summed", "wired"]


class Exchange:
    """What `size` ranks on one machine send each other. They meet through `path`, a file that all see and that is there for this.

    gloo over loopback on a CPU, nccl on GPUs. It is a group of its own: whatever `torch.distributed` is used for beside it is not
    touched. Waiting longer than `patience` for another rank, or one that is gone, is a RuntimeError.
    """

    def __init__(self, path: str, rank: int, size: int, device: torch.device, patience: timedelta) -> None:
        self.rank, self.size = rank, size
        store: Any = dist.FileStore(path, size)  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(patience)
        self._group: Any
        if device.type == "cuda":
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = patience
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            kind: Any = dist.ProcessGroupGloo
            options = kind._Options()
            options._devices = [kind.create_device(hostname="127.0.0.1")]  # nobody else's network
            options._timeout = patience
            self._group = kind(store, rank, size, options)
        self.sum(torch.zeros(1, device=device))  # everybody is there

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what every rank gives, on all of them; `x` may be written to."""
        x = x.contiguous()
        if x.numel():
            self._group.allreduce([x]).wait()
        return x

    def beside(self, x: Tensor, whole: int) -> Tensor:
        """[..., v] of each rank, the last one's perhaps narrower -> [..., whole] on all."""
        share = -(-whole // self.size)
        flat = pad(x, (0, share - x.shape[-1])).reshape(-1, share)
        if not flat.numel():
            return x.new_empty(*x.shape[:-1], whole)
        out = flat.new_empty(self.size * len(flat), share)
        self._group._allgather_base(out, flat.contiguous()).wait()
        rows = out.view(self.size, len(flat), share).transpose(0, 1).reshape(len(flat), -1)
        return rows[:, :whole].reshape(*x.shape[:-1], whole)


class Shared(nn.Module):
    """`inner`, of whose result each rank has a part; `join` makes the whole of it."""

    join: Callable[[Tensor], Tensor]

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Tensor:
        return self.join(self.inner(*args))


class Summed(Shared):
    """Each rank has a summand."""

    def __init__(self, inner: nn.Module, exchange: Exchange) -> None:
        super().__init__(inner)
        self.join = exchange.sum


class _Beside(Shared):
    """Each rank has columns of the logits."""

    def __init__(self, inner: nn.Module, exchange: Exchange, whole: int) -> None:
        super().__init__(inner)
        self.join = lambda x: exchange.beside(x, whole)


class _Rows(nn.Module):
    """An embedding of which each rank has rows: others count as zero, and the sum over the ranks is the whole."""

    def __init__(self, inner: nn.Module, exchange: Exchange, first: int, rows: int) -> None:
        super().__init__()
        self.inner, self._exchange, self._first, self._rows = inner, exchange, first, rows

    def forward(self, tokens: Tensor) -> Tensor:
        own = tokens - self._first
        outside = (own < 0) | (own >= self._rows)
        found = self.inner(own.masked_fill(outside, 0))
        return self._exchange.sum(found.masked_fill(outside[..., None], 0))


def wired(model: Llama, part: Part, exchange: Exchange) -> Llama:
    """`model`, which holds `part`, changed in place so that it computes what the whole model does, on all ranks at once.

    Its config says the whole vocabulary from now on, and this rank's heads.
    """
    own = part.config
    model.set_submodule("tok_embeddings", _Rows(model.tok_embeddings, exchange, part.rank * part.rows, own.vocab_size))
    model.set_submodule("output", _Beside(model.output, exchange, part.whole.vocab_size))
    for layer in model.layers:
        block = cast(Block, layer)
        block.attention.set_submodule("wo", Summed(block.attention.wo, exchange))
        block.set_submodule("feed_forward", Summed(block.feed_forward, exchange))
    model.config = replace(own, vocab_size=part.whole.vocab_size)
    return model
