"""Batches in a reproducible order that can be stopped and taken up again, each rank its part of the same global batch.

The order is `herd.data.mix.Mixture`'s: a pure function of seed and position. The state of a loader is therefore its position
(and where stages began, if only the run could tell), whatever the number of ranks, workers and batches made ahead.

Letters: B rows of one rank's batch, S row length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from herd.data.mix import Mixture, MixtureSource, RowSource
from herd.errors import DataError

__all__ = ["Loader", "TokenBatch"]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """tokens, labels, positions: each [B, S] int64.

    `ids` are the positions of its rows in the order of the run, `seen` counts its tokens without padding (None: not known).
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    ids: tuple[int, ...] = ()
    seen: int | None = None

    def each(self) -> Iterator[TokenBatch]:
        """A batch for each of its rows, in their order; how much of one is padding is not known."""
        for row in range(len(self.tokens)):
            part = slice(row, row + 1)
            yield TokenBatch(self.tokens[part], self.labels[part], self.positions[part], self.ids[part])


class Loader:
    """Endless batches of `batch_rows` rows for rank `rank` of `world`.

    Draw k gives rank r the positions (k * world + r) * batch_rows and following: all ranks together see every position once,
    and the same positions in the same steps whenever batch_rows * world is the same. `workers` threads make batches ahead
    of their use (0: made when asked for); neither they nor anything else changes the order. After `deal_rows` ranks take the rows
    of a draw in turn, one by one: then which rank sees which rows of a step does not depend on how many a batch has.

    `rows` is a mixture, or one source of rows, which is then read again and again in an order drawn from `seed`.
    """

    AHEAD = 2
    """Batches per worker that are made before they are asked for."""

    def __init__(
        self,
        rows: Mixture | RowSource,
        batch_rows: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if not isinstance(rows, Mixture):
            if len(rows) == 0:
                raise DataError("no rows to load: the texts are shorter than one row")
            rows = Mixture([MixtureSource("rows", rows, max_epochs=float("inf"))], seed=seed)
        if batch_rows < 1 or not 0 <= rank < world or workers < 0:
            raise DataError(f"a loader of {batch_rows} rows, rank {rank} of {world}, {workers} workers: that cannot be")
        self.mixture, self.batch_rows, self.rank, self.world = rows, batch_rows, rank, world
        self._position = 0
        self._in_turn = False
        self._starts = rows.starts
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="herd-data") if workers else None
        self._depth = self.AHEAD * workers
        self._ahead: deque[Future[TokenBatch]] = deque()
        self._told = self._doubled({})
        self._notes: list[str] = []

    @property
    def position(self) -> int:
        """Rows that all ranks together were given."""
        return self._position

    @property
    def state(self) -> dict[str, Any]:
        """Small and JSON-able: where the loader is, where stages began, and what it reads."""
        return {"position": self._position, "starts": list(self._starts), "content": self.mixture.content}

    def deal_rows(self) -> None:
        """From the next draw on ranks take rows in turn, not a batch each."""
        self._in_turn = True
        self._ahead.clear()

    def restore(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """Continue from `state`, as if every batch before it had been drawn here. Costs nothing, wherever it is.

        Raises DataError for a state of other data (other sources, weights, rows or seed), unless `exact` is off.
        """
        try:
            position, starts, content = int(state["position"]), tuple(map(int, state["starts"])), state["content"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is no state of a loader: {error!r}") from error
        if position < 0 or not starts or starts[0] != 0 or any(a > b for a, b in pairwise(starts)):
            raise DataError(f"the state of the loader cannot be: position {position}, stages begin at {starts}")
        if exact and content != self.mixture.content:
            raise DataError(
                "the data is not what it was when this state was saved (sources, their weights, rows, packing or seed): "
                "go on with the data of then, or begin anew"
            )
        if len(starts) > len(self.mixture.weights):
            raise DataError(f"the state of the loader is in stage {len(starts)} of {len(self.mixture.weights)}")
        if self.mixture.total is not None and starts != self._starts and any(s <= position for s in starts[1:]):
            raise DataError(
                f"stages began at {starts[1:]} in the run that is continued, and at {self._starts[1:]} in this one"
            )
        self._position = position
        if self.mixture.total is None:
            self._starts = starts
        self._told = self._doubled(self.mixture.epochs(position, self._starts))
        self._notes.clear()
        self._ahead.clear()

    def advance(self, share: float) -> None:
        """The run has used `share` of its budget, 0 to 1. Enters the stages that begin by then, at the next row.

        Does nothing when the mixture knows its `total`. Call it before the draws of a step, on all ranks with the same share.
        """
        if self.mixture.total is not None:
            return
        for stage in self.mixture.stages[len(self._starts) - 1 : -1]:
            if share < stage.until:
                return
            self._starts = (*self._starts, self._position)
            self._notes.append(
                f"data: stage {len(self._starts)} of {len(self.mixture.stages)} begins at row {self._position}"
            )
            self._ahead.clear()

    def draw(self) -> TokenBatch:
        """The next batch of this rank. Raises DataError when a shard is damaged."""
        if self._pool is None:
            batch = self._make(self._position, self._starts)
        else:
            step = self.batch_rows * self.world
            while len(self._ahead) <= self._depth:
                at = self._position + len(self._ahead) * step
                self._ahead.append(self._pool.submit(self._make, at, self._starts))
            batch = self._ahead.popleft().result()
        self._position += self.batch_rows * self.world
        self._tell_epochs()
        return batch

    def ids(self) -> tuple[int, ...]:
        """The positions that the next draw gives this rank."""
        return tuple(self._own(self._position))

    def _own(self, position: int) -> range:
        """Those of this rank when a draw begins at `position`."""
        if self._in_turn:
            return range(position + self.rank, position + self.batch_rows * self.world, self.world)
        first = position + self.rank * self.batch_rows
        return range(first, first + self.batch_rows)

    def where(self, id: int) -> str:
        """Source and `file:line`s of the row at position `id` (of a batch's ids)."""
        source, row = self.mixture.rows(id, 1, self._starts)[0]
        return f"{self.mixture.sources[source].name} ({self.mixture.sources[source].rows.where(row)})"

    def notes(self) -> list[str]:
        """What a person should be told since the last call: stages that began, sources that are read more often than asked."""
        notes, self._notes = self._notes, []
        return notes

    def _make(self, position: int, starts: tuple[int, ...]) -> TokenBatch:
        own = self._own(position)
        rows = self.mixture.rows(own[0], own[-1] - own[0] + 1, starts)[:: own.step]
        read = [self.mixture.sources[source].rows.read(row) for source, row in rows]
        tokens, labels, positions = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*read, strict=True))
        seen = sum(self.mixture.sources[source].rows.filled(row) for source, row in rows)
        return TokenBatch(tokens, labels, positions, tuple(own), seen)

    def _tell_epochs(self) -> None:
        """Note which sources are read more often than asked, in one line: when one begins to be, and when the most doubles."""
        epochs = self.mixture.epochs(self._position, self._starts)
        told, self._told = self._told, self._doubled(epochs)
        if max(self._told.values()) <= max(told.values()) and all(
            told[name] for name in self._told if self._told[name]
        ):
            return
        often = [source for source in self.mixture.sources if self._told[source.name]]
        named = [
            f"{source.name} for the {_nth(ceil(epochs[source.name]))} time"
            + (f" (max_epochs is {source.max_epochs:g})" if source.max_epochs else "")
            for source in often
        ]
        hint = "" if all(source.max_epochs for source in often) else "; max_epochs says how often is fine"
        self._notes.append(f"data: read again: {', '.join(named)}{hint}")

    def _doubled(self, epochs: Mapping[str, float]) -> dict[str, int]:
        """How far each source is beyond what was asked for: 0 not at all, then 1, 2, 4, ... times as often."""
        found = {}
        for source in self.mixture.sources:
            most = 1.0 if source.max_epochs is None else source.max_epochs
            drawn = epochs.get(source.name, 0.0)
            often = ceil(drawn) // (floor(most) + 1) if drawn > most else 0
            found[source.name] = 1 << often.bit_length() - 1 if often else 0
        return found


def _nth(number: int) -> str:
    end = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{end}"
