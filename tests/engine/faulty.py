"""A runner with two tokens that break a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache


class Faulty:
    """Fails for a step with token 21, and gives NaN after token 22; otherwise it is `inner`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        if (batch.tokens == 21).any():
            raise RuntimeError("token 21")
        logits = self.inner.logits(batch, cache)
        logits[batch.tokens[batch.logit_rows] == 22] = float("nan")
        return logits
