"""Who computes a step: a ragged batch in, logits out.

Letters: T rows, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache
from herd.model.llama import Llama

__all__ = ["Runner", "TorchRunner"]


class Runner(Protocol):
    """Runs the rows of a batch, leaves their keys and values in the cache."""

    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """The logits of `batch.logit_rows`, [R, V] float32 on the cache's device."""
        ...


class TorchRunner:
    """The model as it is, on any device, in any dtype, of every generation: the reference for faster runners."""

    def __init__(self, model: Llama) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """See Runner. Only the wanted rows go through the output matrix."""
        x = self.model.embed(batch.tokens)
        h = self.model.hidden(x, batch.positions, cache.bind(batch))
        return self.model.output(h[batch.logit_rows]).float()
