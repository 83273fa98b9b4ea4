"""Batches in a reproducible order that can be stopped and taken up again.

The order of epoch e is a permutation drawn from (seed, e) alone, so the state of a loader is two integers.

Letters: B rows of a batch, S row length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from herd.data.pack import Rows
from herd.data.read import DataError

__all__ = ["Loader", "LoaderState", "TokenBatch"]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """tokens, labels, positions: each [B, S] int64."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class LoaderState:
    """The next row to be given out: epoch and index within its permutation."""

    epoch: int = 0
    index: int = 0


class Loader:
    """Endless batches of `batch_rows` rows; a batch may span the end of an epoch, so none is ever short."""

    def __init__(self, rows: Rows, batch_rows: int, seed: int) -> None:
        if len(rows) == 0:
            raise DataError("no rows to load: the texts are shorter than one row")
        self.rows, self.batch_rows, self.seed = rows, batch_rows, seed
        self.state = LoaderState()
        self._order = self._permutation(0)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def restore(self, state: LoaderState) -> None:
        """Continue from `state`, as if every batch before it had been drawn here."""
        self.state = state
        self._order = self._permutation(state.epoch)

    def draw(self) -> TokenBatch:
        """The next batch."""
        chosen: list[int] = []
        while len(chosen) < self.batch_rows:
            if self.state.index == len(self.rows):
                self.restore(LoaderState(self.state.epoch + 1, 0))
            chosen.append(int(self._order[self.state.index]))
            self.state = LoaderState(self.state.epoch, self.state.index + 1)
        return TokenBatch(
            torch.from_numpy(self.rows.tokens[chosen].astype(np.int64)),
            torch.from_numpy(self.rows.labels[chosen].astype(np.int64)),
            torch.from_numpy(self.rows.positions[chosen].astype(np.int64)),
        )
