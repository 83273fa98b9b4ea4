"""What changes a row of logits before a token is chosen: biases, bans, masks and penalties.

Every function works in place on one row [V] float32; a banned id becomes -inf. Rows are numpy arrays because each is handled
alone, by the same code whatever batch it came in (that is what makes a draw independent of the batch), and on one row numpy's
reductions are several times faster than torch's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Uses", "add_bias", "ban", "keep_allowed", "penalize", "penalize_repetition"]

Row = NDArray[np.float32]
Ids = NDArray[np.int64]


class Uses:
    """How often each id was used: a list of distinct ids and their counts, which grows by one id at a time."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for id in ids:
            self.add(id)

    def add(self, id: int) -> None:
        """One more use of `id`."""
        slot = self._slots.setdefault(id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = id
        self._counts[slot] += 1

    def copy(self) -> Uses:
        """The same uses, independent of these."""
        other = Uses()
        other._slots, other._ids, other._counts = self._slots.copy(), self._ids.copy(), self._counts.copy()
        return other

    @property
    def ids(self) -> Ids:
        """Distinct ids [n], in the order of their first use."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Row:
        """Uses of each of `ids` [n], at least 1."""
        return self._counts[: len(self._slots)]


def add_bias(row: Row, ids: Ids, values: Row) -> None:
    """Add `values` [n] to the logits of the distinct `ids` [n]."""
    row[ids] += values


def ban(row: Row, ids: Ids) -> None:
    """Rule out `ids`; those beyond the vocabulary are none of its tokens and are passed over."""
    row[ids[ids < row.shape[0]]] = -np.inf


def keep_allowed(row: Row, bits: NDArray[np.int32]) -> None:
    """Rule out what `bits` [ceil(n / 32)] (bit i % 32 of word i // 32 allows id i) does not allow; ids beyond them too."""
    allowed = np.unpackbits(bits.view(np.uint8), count=min(row.shape[0], 32 * bits.shape[0]), bitorder="little")
    np.putmask(row[: allowed.shape[0]], allowed == 0, -np.inf)
    row[allowed.shape[0] :] = -np.inf


def penalize_repetition(row: Row, ids: Ids, penalty: float) -> None:
    """Divide positive and multiply negative logits of the distinct `ids` by `penalty` (arXiv 1909.05858)."""
    values = row[ids]
    row[ids] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))


def penalize(row: Row, uses: Uses, presence: float, frequency: float) -> None:
    """Subtract `presence` once and `frequency` per use from the logits of the ids used (as the OpenAI API defines them)."""
    row[uses.ids] -= np.float32(presence) + np.float32(frequency) * uses.counts
