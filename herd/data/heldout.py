"""Documents for evaluation, in a fixed order.

Letters: B rows, S row length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from herd.data.batch import TokenBatch
from herd.data.encode import IGNORE
from herd.data.pack import PackedRows
from herd.errors import HerdError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["HeldOut"]


class HeldOut:
    """Rows of documents that are not trained on. `names` says which sources or files they are from."""

    def __init__(
        self, rows: Sequence[PackedRows], tokenizer: Tokenizer, names: Sequence[str], batch_rows: int = 1
    ) -> None:
        self.rows, self.tokenizer, self.names, self.batch_rows = tuple(rows), tokenizer, tuple(names), batch_rows

    def __len__(self) -> int:
        """Rows of all sources."""
        return sum(len(rows) for rows in self.rows)

    def batches(self, *, rank: int = 0, world: int = 1) -> Iterator[TokenBatch]:
        """Every row once and the same each time, `batch_rows` at a time (the last batch may be shorter).

        With `world`, every `world`-th row from `rank` on; ranks may have different numbers of batches.
        """
        places = [(rows, i) for rows in self.rows for i in range(len(rows))][rank::world]
        for start in range(0, len(places), self.batch_rows):
            chosen = places[start : start + self.batch_rows]
            read = [rows.read(i) for rows, i in chosen]
            tokens, labels, positions = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*read, strict=True))
            yield TokenBatch(tokens, labels, positions, seen=sum(rows.filled(i) for rows, i in chosen))

    @property
    def learned(self) -> int:
        """Labels of all rows that count."""
        return self._sums[0]

    @property
    def size(self) -> int:
        """UTF-8 bytes of what the labels cover. Special tokens among them have none.

        Bits per byte = the sum of the losses in nats over all labels / ln 2 / size. It does not depend on the vocabulary but
        for end tokens, whose losses are in the sum, and for the space that Llama 2's vocabulary puts before a text.
        """
        return self._sums[1]

    @cached_property
    def _sums(self) -> tuple[int, int]:
        lengths = np.zeros(self.tokenizer.vocab_size, np.int64)
        seen = np.zeros(self.tokenizer.vocab_size, bool)
        tokens = size = 0
        for rows in self.rows:
            for i in range(len(rows)):
                labels = rows.read(i)[1]
                labels = labels[labels != IGNORE]
                for new in np.unique(labels[~seen[labels]]).tolist():
                    lengths[new], seen[new] = self._bytes(new), True
                tokens += len(labels)
                size += int(lengths[labels].sum())
        return tokens, size

    def _bytes(self, token: int) -> int:
        try:
            return len(self.tokenizer.bytes_of(token))
        except HerdError:  # a hole in the numbering
            return 0
