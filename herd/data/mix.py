"""Which row of which source stands at which position of the run. No torch.

The order is a pure function of (seed, position): `Mixture.rows` computes any stretch of it directly, whatever came before, so
it does not depend on the number of ranks or workers, and taking a run up again costs nothing. Sources have shares (weights)
that may change at the borders of stages: a curriculum, or an annealing phase. Each epoch of a source is a permutation of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from herd.data.config import StagePart
from herd.data.order import Shares, key_of, permuted_one
from herd.errors import DataError

__all__ = ["Mixture", "MixtureSource", "RowSource"]

Longs = NDArray[np.int64]


class RowSource(Protocol):
    """Rows of equal length that can be read in any order. `content` names them: equal contents are equal rows."""

    @property
    def length(self) -> int:
        """S, positions of a row."""
        ...

    @property
    def content(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Longs, Longs, Longs]:
        """Tokens, labels and positions of a row, each [S] int64."""
        ...

    def filled(self, index: int) -> int:
        """Positions of a row that are no padding."""
        ...

    def where(self, index: int) -> str:
        """Where its documents come from, for messages."""
        ...


@dataclass(frozen=True, slots=True)
class MixtureSource:
    """Rows with a name and a share; more than `max_epochs` of them are said aloud (None: one)."""

    name: str
    rows: RowSource
    weight: float = 1.0
    max_epochs: float | None = None


class Mixture:
    """Positions 0, 1, 2, ... of a run, each a row of a source.

    `stages` hold for shares of `total`, the rows of the whole run; with `total` None (a budget in minutes) nobody knows where
    a stage ends, and `Loader.advance` says so. Raises DataError for sources that cannot be mixed.
    """

    def __init__(
        self, sources: Sequence[MixtureSource], *, seed: int, stages: Sequence[StagePart] = (), total: int | None = None
    ) -> None:
        self.sources, self.seed, self.total = tuple(sources), seed, total
        lengths = {source.rows.length for source in sources}
        if len(lengths) != 1:
            raise DataError(f"rows of {len(lengths)} different lengths cannot be mixed: {sorted(lengths)}")
        self.length = lengths.pop()
        self.stages = tuple(stages)
        weights = [[stage.weights.get(source.name, 0.0) for source in sources] for stage in stages]
        if not stages:
            weights = [[source.weight for source in sources]]
        for row in weights:
            for source, weight in zip(sources, row, strict=True):
                if weight and not len(source.rows):
                    raise DataError(f"{source.name}: has a share of the run, but no row of {self.length} positions")
        self.weights = weights
        self._shares = [Shares(row, key_of("stage", seed, i)) for i, row in enumerate(weights)]

    @property
    def starts(self) -> tuple[int, ...]:
        """Where stages begin, as far as that is known before the run: all of them when `total` is known, else the first."""
        if self.total is None:
            return (0,)
        return (0, *(round(stage.until * self.total) for stage in self.stages[:-1]))

    @property
    def content(self) -> str:
        """One SHA-256 for everything that the order and the rows depend on, but for the length of the run."""
        told = [
            self.seed,
            self.weights,
            [(source.name, source.rows.content, len(source.rows)) for source in self.sources],
        ]
        return sha256(repr(told).encode()).hexdigest()

    def drawn(self, position: int, starts: Sequence[int]) -> list[int]:
        """How many rows of each source stand before `position`, when stages begin at `starts`."""
        counts = [0] * len(self.sources)
        for stage, start in enumerate(starts):
            end = starts[stage + 1] if stage + 1 < len(starts) else position
            size = min(end, position) - start
            if size > 0:
                counts = [a + b for a, b in zip(counts, self._shares[stage].counts(size), strict=True)]
        return counts

    def epochs(self, position: int, starts: Sequence[int]) -> dict[str, float]:
        """How often each source was read before `position`, by name; sources without rows are left out."""
        drawn = self.drawn(position, starts)
        named = zip(self.sources, drawn, strict=True)
        return {source.name: count / len(source.rows) for source, count in named if len(source.rows)}

    def rows(self, position: int, count: int, starts: Sequence[int]) -> list[tuple[int, int]]:
        """(source, row) of `count` positions from `position` on."""
        found: list[tuple[int, int]] = []
        drawn = self.drawn(position, starts)
        for at in range(position, position + count):
            stage = bisect_right(starts, at) - 1
            source = self._shares[stage].source(at - starts[stage])
            found.append((source, self._row(source, drawn[source])))
            drawn[source] += 1
        return found

    def _row(self, source: int, number: int) -> int:
        """The `number`-th row that is drawn of a source."""
        size = len(self.sources[source].rows)
        epoch, index = divmod(number, size)
        return permuted_one(index, size, _key(self.seed, self.sources[source].name, epoch))


@lru_cache(maxsize=1024)
def _key(seed: int, name: str, epoch: int) -> int:
    return key_of("rows", seed, name, epoch)
