"""From the logits of a step to what each of its sequences gained: tokens, scores, or the error that ends its request."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from herd.engine.grammar import Grammar
from herd.engine.logprobs import chosen_and_best
from herd.engine.request import Sequence
from herd.engine.sampler import NOT_FINITE, RowState, Sampled, Sampler
from herd.engine.scheduler import Chunk
from herd.engine.speculate import Speculation
from herd.errors import HerdError

__all__ = ["Chosen", "Found", "Row", "choose", "row_of"]


@dataclass(slots=True)
class Row:
    """What the engine keeps with a sequence: how it is sampled, what it must be, prompt log-probabilities nobody was told yet."""

    sampling: RowState
    grammar: Grammar | None = None
    scored: list[tuple[int, float, dict[int, float]]] = field(default_factory=list)


class Chosen(NamedTuple):
    """A token after a chunk, with its log-probabilities when they are asked for."""

    token: int
    logprob: float | None = None
    top: dict[int, float] | None = None
    logits: NDArray[np.float32] | None = None


@dataclass(slots=True)
class Found:
    """What a chunk gave: the tokens after it, none when it ends inside a prompt."""

    sampled: list[Chosen] = field(default_factory=list)


def row_of(sequence: Sequence) -> Row:
    """What is kept with a sequence."""
    row = sequence.state
    assert isinstance(row, Row)
    return row


def choose(
    sampler: Sampler,
    chunks: Seq[Chunk],
    logits: Seq[Tensor | Exception],
    speculation: Speculation | None,
    *,
    deterministic: bool = False,
) -> list[Found | Exception]:
    """What `logits` [chunk.logits, V] of every chunk give, or an error for those that have none.

    On a GPU all rows are sampled in one call; where that fails, each alone, so that nobody meets another's error. A CPU takes
    them one by one: of 16 rows of 128,256 logits, on one core, in 10 instead of 305 ms with top-p, 0.7 instead of 14 greedily. So
    does `deterministic`, since a GPU may add a row in another order when there are more.
    """
    together: dict[int, Sampled] = {}
    alone = [i for i, one in enumerate(logits) if isinstance(one, Tensor) and chunks[i].sample and not chunks[i].drafts]
    rows = [one for i in alone if isinstance(one := logits[i], Tensor)]
    if len(rows) > 1 and not rows[0].is_cpu and not deterministic:
        try:
            states = [row_of(chunks[i].sequence).sampling for i in alone]
            found = sampler.sample(torch.stack([row[-1] for row in rows]), states)
            together = dict(zip(alone, found, strict=True))
        except Exception:
            together = {}
    return [
        one if isinstance(one, Exception) else _outcome(sampler, chunks[i], one, speculation, together.get(i))
        for i, one in enumerate(logits)
    ]


def _outcome(
    sampler: Sampler, chunk: Chunk, logits: Tensor, speculation: Speculation | None, sampled: Sampled | None
) -> Found | Exception:
    row = row_of(chunk.sequence)
    try:
        found = Found()
        if chunk.sequence.request.params.prompt_logprobs is not None:
            _score(chunk, logits, row)
        if chunk.sample:
            found.sampled = _sample(sampler, chunk, logits, row.sampling, speculation, sampled)
        return found
    except Exception as error:
        return error


def _sample(
    sampler: Sampler,
    chunk: Chunk,
    logits: Tensor,
    row: RowState,
    speculation: Speculation | None,
    sampled: Sampled | None,
) -> list[Chosen]:
    """The tokens after the chunk: one, with drafts those that were right and the one after them."""
    if chunk.drafts:
        assert speculation is not None
        every = speculation.accept(sampler, logits, chunk.sequence, row)
    else:
        every = [sampled] if sampled is not None else sampler.sample(logits[-1:], [row])
    wanted = chunk.sequence.request.logits
    found = [
        Chosen(one.token, one.logprob, one.top, logits[i - len(every)].cpu().numpy().copy() if wanted else None)
        for i, one in enumerate(every)
        if one.token is not None
    ]
    if not found:
        raise HerdError(every[0].error or NOT_FINITE)
    return found


def _score(chunk: Chunk, logits: Tensor, row: Row) -> None:
    """Log-probabilities of the prompt tokens that follow the chunk's rows."""
    sequence = chunk.sequence
    prompt, count = sequence.request.prompt, sequence.request.params.prompt_logprobs
    assert count is not None
    first = chunk.start + chunk.count - chunk.logits
    for i in range(max(first, sequence.scored), min(chunk.start + chunk.count, len(prompt) - 1)):
        values = logits[i - first].cpu().numpy()
        if not np.isfinite(values.max()):
            raise HerdError(NOT_FINITE)
        row.scored.append((prompt[i + 1], *chosen_and_best(values, prompt[i + 1], count)))
