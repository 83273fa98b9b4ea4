"""Steps that choose their tokens on the device, and one step begun before the last one's tokens are known.

A step whose rows are all single positions, sampled by what can be recorded, is given to the device whole
(`herd.engine.graphs`): what comes back is ids. Their keys are where the next step needs them, and so are the ids, so the next
step of the same sequences can be begun first and the ids read while it runs: the host's work between two steps is then hidden
behind the device's. A sequence that turns out to have ended was computed once in vain, in blocks of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from herd.engine.choosing import Chosen, Found, row_of
from herd.engine.cuda_runner import CudaRunner
from herd.engine.graphs import DecodeRow, Flight
from herd.engine.paged import PagedCache
from herd.engine.sampler import NOT_FINITE
from herd.engine.scheduler import Chunk, StepPlan
from herd.engine.static_sample import kind_of, kind_of_all
from herd.errors import HerdError

__all__ = ["Ahead"]


class Ahead:
    """The recorded steps of `runner` over `cache`, for an engine."""

    def __init__(self, runner: CudaRunner, cache: PagedCache) -> None:
        self.runner, self.cache = runner, cache

    def launch(self, plan: StepPlan, before: StepPlan | None = None) -> Flight | None:
        """Begin `plan`; None when it cannot be done whole on the device.

        `before` is the step under way, when the tokens of `plan` are still to come from it. Copies of the plan are made first.
        """
        if not all(map(_single, plan.rows)):
            return None
        kind = kind_of_all([kind_of(row_of(chunk.sequence).sampling) for chunk in plan.rows])
        if kind is None:
            return None
        sources = {} if before is None else {chunk.sequence: i for i, chunk in enumerate(before.rows)}
        rows = [_row(chunk, sources.get(chunk.sequence)) for chunk in plan.rows]
        plan.copy(self.cache.copy)
        return self.runner.launch(rows, kind, self.cache)

    @staticmethod
    def land(plan: StepPlan, flight: Flight) -> list[Found | Exception]:
        """Wait for a step: the outcome of each of its chunks."""
        return [
            Found([Chosen(token)]) if finite else HerdError(NOT_FINITE)
            for _, (token, finite) in zip(plan.rows, flight.read(), strict=True)
        ]

    def warm_up(self, tell: Callable[[int, int], None]) -> float:
        """Record every step now; seconds it took."""
        return self.runner.warm_up(self.cache, tell)


def _single(chunk: Chunk) -> bool:
    request = chunk.sequence.request
    return (
        chunk.sample
        and (chunk.count, chunk.logits) == (1, 1)
        and (request.adapter is None or chunk.before > 0)  # virtual tokens are in the cache
        and not request.logits
        and request.params.prompt_logprobs is None
    )


def _row(chunk: Chunk, source: int | None) -> DecodeRow:
    state, params = row_of(chunk.sequence).sampling, chunk.sequence.request.params
    known: Seq[int] = chunk.tokens if source is None else (0,)
    return DecodeRow(
        known[0],
        chunk.position,
        chunk.blocks,
        -1 if source is None else source,
        state.uniform(ahead=source is not None) if params.temperature > 0 else 0.0,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
    )
