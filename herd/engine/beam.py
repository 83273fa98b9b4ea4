"""Beam search: the likeliest replies, as far as `beams` hypotheses at a time can see.

The rules are those of transformers' beam search with `early_stopping=False`: of all continuations of the running hypotheses the
best (stop ids + 1) x beams are looked at; those of the first `beams` that end are finished, with the sum of log-probabilities
over length ** length_penalty as their score (the stop id counts); the best others run on. The search ends when the best running
one, at its present length, is not better than the worst of `beams` finished ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from herd.chat.params import SamplingParams
from herd.engine.logprobs import log_total
from herd.engine.sample import best_of_row
from herd.errors import HerdError

__all__ = ["Beam", "BeamSearch", "Branch", "beam_search"]


@dataclass(frozen=True, slots=True)
class Beam:
    """One hypothesis: generated ids, the sum of their log-probabilities, its `score` once it is finished, and why it is."""

    tokens: tuple[int, ...]
    logprob: float
    score: float | None = None
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """What a running hypothesis continues: the index of its parent among those of the step before, and its new token."""

    parent: int
    token: int


class BeamSearch:
    """The state of one search. Feed `advance` the logits after each hypothesis in `running`, until `done`; then read `best`.

    An engine keeps one sequence per entry of `running` (one at first, for the prompt) and after each step forks and frees them
    as the branches say. `max_tokens` is the longest reply, stop id included.
    """

    def __init__(self, params: SamplingParams, stop_ids: Iterable[int], max_tokens: int) -> None:
        assert params.beams > 1
        assert max_tokens > 0
        self.params, self.max_tokens = params, max_tokens
        self.stop_ids = frozenset(stop_ids)
        self.running = [Beam((), 0.0)]
        self.finished: list[Beam] = []
        self.done = False
        self._stops = np.array(sorted(self.stop_ids), dtype=np.int64)

    def best(self) -> list[Beam]:
        """The n best finished hypotheses, best first (before the end: the best so far)."""
        return self.finished[: self.params.n]

    def advance(self, logits: NDArray[np.float32]) -> list[Branch]:
        """One token further: logits [len(running), V] float32. Gives what the new `running` continue; empty when done.

        Raises HerdError when logits are not finite (the whole search ends, as every hypothesis is compared with the others)
        and when nothing is left to choose from.
        """
        assert len(logits) == len(self.running), f"{len(logits)} rows for {len(self.running)} hypotheses"
        length = len(self.running[0].tokens) + 1
        beams, last = self.params.beams, length >= self.max_tokens
        running: list[tuple[Beam, Branch]] = []
        for rank, (logprob, branch) in enumerate(self._candidates(logits, length)):
            beam = Beam((*self.running[branch.parent].tokens, branch.token), logprob)
            stopped = branch.token in self.stop_ids
            if stopped or last:
                if rank < beams:
                    self._finish(beam, "stop" if stopped else "length")
            elif len(running) < beams:
                running.append((beam, branch))
        self.running = [beam for beam, _ in running]
        self.done = not running or (
            len(self.finished) == beams and not self._score(running[0][0]) > (self.finished[-1].score or 0.0)
        )
        if self.done:
            self.running = []
            if not self.finished:
                raise HerdError("beam search has nothing to go on with: min_tokens rules out all that the model allows")
        return [] if self.done else [branch for _, branch in running]

    def _candidates(self, logits: NDArray[np.float32], length: int) -> list[tuple[float, Branch]]:
        """The best continuations of all running hypotheses, best first."""
        count = max(2, 1 + len(self.stop_ids)) * self.params.beams
        found: list[tuple[float, Branch]] = []
        for parent, (beam, row) in enumerate(zip(self.running, logits, strict=True)):
            if not np.isfinite(row.max()):
                raise HerdError("the model gave numbers that are not finite, so beam search cannot go on")
            total = log_total(row)
            if length <= self.params.min_tokens and len(self._stops):
                row = row.copy()
                row[self._stops] = -np.inf
            for token in best_of_row(row, count):
                if np.isfinite(row[token]):
                    found.append((beam.logprob + (float(row[token]) - total), Branch(parent, int(token))))
        found.sort(key=lambda pair: -pair[0])
        return found[:count]

    def _score(self, beam: Beam) -> float:
        return beam.logprob / len(beam.tokens) ** self.params.length_penalty

    def _finish(self, beam: Beam, reason: str) -> None:
        self.finished.append(Beam(beam.tokens, beam.logprob, self._score(beam), reason))
        self.finished.sort(key=lambda b: -(b.score or 0.0))
        del self.finished[self.params.beams :]


def beam_search(
    step: Callable[[list[tuple[int, ...]]], NDArray[np.float32]],
    params: SamplingParams,
    stop_ids: Iterable[int],
    max_tokens: int,
) -> list[Beam]:
    """The n best replies. `step` maps the running hypotheses' generated ids to logits [R, V] of what comes after each."""
    search = BeamSearch(params, stop_ids, max_tokens)
    while not search.done:
        search.advance(step([beam.tokens for beam in search.running]))
    return search.best()
