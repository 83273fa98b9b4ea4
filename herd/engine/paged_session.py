"""One stream of ids through the fastest runner: `Session` over a paged cache, for a chat in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from herd.engine.native import runner_for, unsupported
from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache
from herd.engine.runner import Runner
from herd.engine.session import FIRST_ALLOCATION, Session
from herd.engine.virtual import VirtualTokens
from herd.errors import ConfigError
from herd.model.llama import Llama
from herd.quant.apply import kind_of

__all__ = ["PagedSession", "session_for"]

BLOCK = 16
"""Positions of a block."""


def session_for(model: Llama, *, max_len: int | None = None) -> Session:
    """The session that runs `model` fastest: over native kernels where they can run it, otherwise the naive one."""
    return Session(model, max_len=max_len) if unsupported(model) is not None else PagedSession(model, max_len=max_len)


class PagedSession(Session):
    """As `Session`, with every step through a runner (`runner_for` unless one is given) and a PagedCache whose blocks all belong
    to this stream, in order.

    Keys and values are kept in the dtype of the activations, those of quantized models in float16: their products round
    activations to 8 bits anyway, and half the bytes are read.

    `virtual` tokens stand before everything; `max_len` is then what they leave of the context, and they count nowhere. Raises
    ConfigError when that is too little.
    """

    def __init__(
        self,
        model: Llama,
        *,
        max_len: int | None = None,
        runner: Runner | None = None,
        virtual: VirtualTokens | None = None,
    ) -> None:
        super().__init__(model, max_len=max_len)
        del self.cache
        self.first = 0 if virtual is None else virtual.count
        if self.max_len - self.first < 2:
            raise ConfigError(
                f"{self.first} virtual tokens leave no room for a prompt and a reply in a context of {self.max_len} tokens"
            )
        self.max_len -= self.first
        self.runner = runner_for(model) if runner is None else runner
        dtype = torch.float16 if kind_of(model) is not None else model.norm.weight.dtype
        device = model.norm.weight.device
        blocks = -(-(self.first + min(FIRST_ALLOCATION, self.max_len)) // BLOCK)
        self._made: type[PagedCache] = getattr(self.runner, "cache", PagedCache)  # over several ranks: a part on each
        self.paged = self._made(model.config, blocks=blocks, block_size=BLOCK, dtype=dtype, device=device)
        if virtual is not None:
            virtual.put(self.paged, range(blocks))

    def _forward(self, ids: Sequence[int]) -> Tensor:
        start, rows = self.first + len(self.tokens), len(ids)
        self._make_room(start + rows)
        device = self.paged.device
        positions = torch.arange(start, start + rows, device=device)
        batch = RaggedBatch(
            tokens=torch.tensor(ids, device=device),
            positions=positions,
            slots=positions,  # blocks are in order
            spans=torch.tensor([[0, rows, start, 0]], device=device),
            tables=torch.arange(self.paged.blocks, dtype=torch.int32, device=device)[None],
            logit_rows=torch.tensor([rows - 1], device=device),
        )
        logits = self.runner.logits(batch, self.paged)
        self.tokens.extend(ids)
        return logits

    def _make_room(self, positions: int) -> None:
        """A larger cache with what is stored when it is full; at least twice as large, at most the context."""
        old, needed = self.paged, -(-positions // BLOCK)
        if needed <= old.blocks:
            return
        blocks = min(max(needed, 2 * old.blocks), -(-(self.first + self.max_len) // BLOCK))
        new = self._made(old.config, blocks=blocks, block_size=BLOCK, dtype=old.dtype, device=old.device)
        for to, source in zip(new.tensors, old.tensors, strict=True):
            to[: old.blocks] = source
        self.paged = new
