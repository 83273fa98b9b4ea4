"""Speculative decoding: several guessed tokens are checked in one step, and what comes out is what would have come anyway.

A drafter guesses; the guesses run as further rows of the sequence's chunk, so the model gives the distribution after each of
them; `accept` goes through these rows in order and stops at the first guess that is wrong. The rows after it are as if they had
never been computed (the scheduler sets `computed` back).

Two rules of acceptance, both exact in distribution:

- A guess without a distribution: the token is drawn from the model's row as always, and the guess was right when it is that
  token. As a draw depends on seed and position only (`herd.engine.sampler`), every token is the very one that would have been
  drawn without guesses: greedy or sampled, whatever was guessed, however many, and whether there was room for it.
- A guess x drawn from a distribution q: accepted with probability min(1, p(x) / q(x)), otherwise drawn from what p has more
  than q (Leviathan et al. 2023, Chen et al. 2023). It accepts the most guesses, but the tokens of a seed then depend on where
  guesses were made.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from herd.engine.logprobs import chosen_and_best
from herd.engine.pace import Pace
from herd.engine.request import Sequence
from herd.engine.sample import Weights, draw
from herd.engine.sampler import RowState, Sampled, Sampler
from herd.engine.scheduler import StepPlan
from herd.errors import ConfigError
from herd.model.config import ModelConfig

__all__ = ["DRAFT_LANE", "Ask", "Draft", "Drafter", "Speculation", "accept", "speculates"]

DRAFT_LANE, ACCEPT_LANE, REST_LANE = 1, 2, 3
"""Random numbers of one position beside the token's own: the guess, whether it is accepted, and what comes instead."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses `ids` for the next tokens; `weights` has the distribution each was drawn from, None for the first rule above."""

    ids: tuple[int, ...]
    weights: tuple[Weights, ...] | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """At most `count` guesses are wanted of what follows `sequence`, which is sampled by `row` (not to be changed)."""

    sequence: Sequence
    row: RowState
    count: int


class Drafter(Protocol):
    """Guesses what comes next. It is never asked about a sequence it was told to forget."""

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError when it cannot guess for a model of `config`."""
        ...

    def draft(self, asked: Seq[Ask]) -> list[Draft]:
        """A draft for each, of no tokens when it has no idea."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has ended."""
        ...


def speculates(sequence: Sequence) -> bool:
    """Whether guesses are any use: one token is due, and it is no beam search."""
    due = len(sequence.tokens) - sequence.computed == 1
    return due and sequence.status == "running" and sequence.request.params.beams == 1


def accept(
    sampler: Sampler, logits: Tensor, row: RowState, draft: Draft, stops: frozenset[int] = frozenset()
) -> list[Sampled]:
    """The tokens that a checked draft gives: those of its guesses that hold, then one that the model chose itself.

    `logits` [1 + n, V] of the last known token and of the n guesses; n may be smaller than the draft is long. `row` is not
    advanced. It ends with a token of `stops`, and at an error: that of the first row is given, a later one shows itself in the
    next step.
    """
    out: list[Sampled] = []
    count = logits.shape[0] - 1
    for i in range(count + 1):
        here = logits[i : i + 1]
        guess = draft.ids[i] if i < count else None
        if guess is None or draft.weights is None or row.params.temperature == 0:
            (found,) = sampler.sample(here, [row])
        else:
            found = _reject(sampler, here, row, guess, draft.weights[i])
        if found.token is None:
            return out or [found]
        out.append(found)
        if found.token != guess or found.token in stops:
            break
        if i == 0:
            row = row.fork()
        row.append(found.token)
    return out


def _reject(sampler: Sampler, logits: Tensor, row: RowState, guess: int, weights: Weights) -> Sampled:
    """The token of one row, logits [1, V], after a guess drawn from `weights`."""
    size = logits.shape[-1]
    try:
        p = sampler.distribution(logits[0], row).dense(size)
    except ConfigError as error:
        return Sampled(None, error=str(error))
    q = weights.dense(size)
    token = guess
    if row.uniform(ACCEPT_LANE) * q[guess] >= p[guess]:
        rest = (p - q).clip(min=0).astype(np.float32)
        if not rest.any():  # they differ by rounding alone
            rest = p.astype(np.float32)
        token = draw(Weights(None, rest), row.uniform(REST_LANE))
    if (count := row.wants_logprobs) is None:
        return Sampled(token)
    logprob, top = chosen_and_best(logits[0].detach().to("cpu", torch.float32).numpy(), token, count)
    return Sampled(token, logprob, None if row.params.logprobs is None else top)


class Speculation:
    """Guesses for the sequences of one engine: `propose` before a plan, `accept` for its chunks, `settle` after the step.

    `pace` decides how much is guessed; `clock` gives seconds. Raises ConfigError when the drafter cannot guess for `config`.
    """

    def __init__(
        self,
        drafter: Drafter,
        config: ModelConfig,
        *,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        drafter.check(config)
        self.drafter, self.clock = drafter, clock
        self.pace = Pace() if pace is None else pace
        self.failed = False
        """The drafter raised an error: it is not asked again."""
        self._drafts: dict[Sequence, Draft] = {}
        self._known: set[Sequence] = set()
        self._began = 0.0

    def propose(self, running: Seq[Sequence], row_of: Callable[[Sequence], RowState]) -> None:
        """Set the drafts of those of `running` for which guessing is likely to pay."""
        self._began = self.clock()
        self._drafts.clear()
        for sequence in [s for s in self._known if s.status == "finished"]:
            self._forget(sequence)
        self.pace.begin()
        ready = [s for s in running if speculates(s)]
        asked = [Ask(s, row_of(s), count) for s in ready if (count := self.pace.count(s, len(ready))) > 0]
        if not asked or self.failed:
            return
        self._known.update(ask.sequence for ask in asked)
        try:
            drafts = self.drafter.draft(asked)
        except Exception as error:  # requests do not need guesses
            self.failed = True
            warnings.warn(f"speculative decoding is switched off: {type(error).__name__}: {error}", stacklevel=2)
            return
        for ask, draft in zip(asked, drafts, strict=True):
            if draft.ids:
                ask.sequence.drafts = draft.ids
                self._drafts[ask.sequence] = draft

    def accept(self, sampler: Sampler, logits: Tensor, sequence: Sequence, row: RowState) -> list[Sampled]:
        """`accept` for the draft of `sequence`, of which logits.shape[0] - 1 guesses were computed."""
        found = accept(sampler, logits, row, self._drafts[sequence], sequence.request.stops)
        self.pace.learn(sequence, logits.shape[0] - 1, len(found) - 1)
        return found

    def settle(self, plan: StepPlan, made: int) -> None:
        """A step is over that gave `made` tokens: what it cost."""
        if plan.rows and all(chunk.sample and chunk.count == 1 + len(chunk.drafts) for chunk in plan.rows):
            drafted = sum(len(chunk.drafts) for chunk in plan.rows)
            self.pace.settle(len(plan.rows), drafted, made, self.clock() - self._began)

    def _forget(self, sequence: Sequence) -> None:
        self._known.remove(sequence)
        self.pace.forget(sequence)
        self.drafter.forget(sequence)
