"""A model without numbers: its next token is a hash of everything before it, read through the paged cache like keys are.

What a slot of the cache holds is the hash of the prefix that ends there, so a wrong block, a missed copy or a stale prefix shows
at once: every step checks all slots of its sequences.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from herd.chat.params import SamplingParams
from herd.engine.blocks import BlockPool
from herd.engine.request import Request, Sequence
from herd.engine.scheduler import Chunk, Progress, Scheduler, StepPlan

VOCAB = 7
"""Few ids, so that stop ids and equal prefixes are common."""


def hashed(before: int, token: int) -> int:
    """The prefix that ends with `token`."""
    return zlib.crc32(token.to_bytes(4, "little"), before)


def prefix(tokens: Iterable[int], adapter: str | None) -> int:
    """Hash of a whole prefix."""
    state = zlib.crc32((adapter or "").encode())
    for token in tokens:
        state = hashed(state, token)
    return state


def virtual(count: int) -> list[int]:
    """What stands for the virtual tokens of an adapter: ids that nobody says."""
    return list(range(VOCAB, VOCAB + count))


def chosen(state: int, index: int) -> int:
    """What continuation `index` says after a prefix."""
    return zlib.crc32(index.to_bytes(4, "little"), state) % VOCAB


def expected(request: Request, index: int, max_len: int, *, stop: bool = True, before: int = 0) -> list[int]:
    """The reply, made without a cache or a scheduler; going on after stop ids when `stop` is False. `before`: virtual tokens."""
    tokens = list(request.prompt)
    state = prefix([*virtual(before), *tokens], request.adapter)
    most = max_len if request.params.max_tokens is None else len(tokens) + request.params.max_tokens
    while len(tokens) < min(most, max_len):
        token = chosen(state, index)
        tokens.append(token)
        state = hashed(state, token)
        if stop and token in request.stops:
            break
    return tokens[len(request.prompt) :]


class FakeModel:
    """Runs plans over `slots`, one number per position of the pool."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.size = scheduler.pool.block_size
        self.slots = [0] * (scheduler.pool.n_blocks * self.size)

    def pin(self, adapter: str, count: int) -> None:
        """Load an adapter of so many virtual tokens."""
        blocks = self.scheduler.pin(adapter, count)
        state = prefix((), adapter)
        for position, token in enumerate(virtual(count)):
            state = hashed(state, token)
            self.slots[blocks[position // self.size] * self.size + position % self.size] = state

    def step(self) -> list[Progress]:
        """Plan, run, commit."""
        plan = self.scheduler.plan()
        return self.scheduler.commit(plan, self.run(plan))

    def run(self, plan: StepPlan) -> list[list[int]]:
        """What each chunk samples."""
        size = self.size
        for source, target in plan.copies:
            self.slots[target * size : (target + 1) * size] = self.slots[source * size : (source + 1) * size]
        out = []
        written: set[int] = set()
        for chunk in plan.rows:
            states = self._states(chunk, written)
            out.append(_sample(chunk, states) if chunk.sample else [])
        return out

    def _states(self, chunk: Chunk, written: set[int]) -> list[int]:
        """The hash after each row of a chunk, written to its slots; what it reads is checked."""
        s, size = chunk.sequence, self.size
        state = prefix((), s.request.adapter)
        for position, token in enumerate([*virtual(chunk.before), *s.tokens[: chunk.start]]):
            state = hashed(state, token)
            slot = chunk.blocks[position // size] * size + position % size
            assert self.slots[slot] == state, f"position {position} of {s} is not in slot {slot}"
        states = []
        assert len(chunk.tokens) == chunk.count
        for position, token in enumerate(chunk.tokens, chunk.position):
            state = hashed(state, token)
            slot = chunk.blocks[position // size] * size + position % size
            assert slot not in written, f"two rows write slot {slot}"
            assert self.scheduler.pool.holds(slot // size) is None, f"{s} writes a block that others may find"
            written.add(slot)
            self.slots[slot] = state
            states.append(state)
        return states


def _sample(chunk: Chunk, states: list[int]) -> list[int]:
    """One token, or with drafts as many as were right and the next."""
    index, guesses = chunk.sequence.index, chunk.drafts
    out = []
    for i, state in enumerate(states[len(states) - 1 - len(guesses) :]):
        out.append(chosen(state, index))
        if i == len(guesses) or guesses[i] != out[-1]:
            break
    return out


def scheduler(blocks: int = 32, size: int = 4, **limits: int) -> Scheduler:
    """A scheduler over so many blocks of `size` positions."""
    limits = {"max_seqs": 4, "max_tokens": 16, "max_len": 64, **limits}
    return Scheduler(BlockPool(blocks, size), **limits)


def request(name: str, prompt: list[int], max_tokens: int | None = 8, **more: object) -> Request:
    """A request; `more` are stop ids, adapter, salt, and sampling parameters."""
    own = {k: more.pop(k) for k in ("stop_ids", "adapter", "salt") if k in more}
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **more), **own)  # type: ignore[arg-type]


def finish_all(s: Scheduler, model: FakeModel, steps: int = 1000) -> dict[tuple[str, int], Sequence]:
    """Run until idle; every sequence that ended on the way."""
    ended = {}
    for _ in range(steps):
        if s.idle:
            break
        for progress in model.step():
            if progress.finish:
                ended[progress.sequence.request.id, progress.sequence.index] = progress.sequence
        s.check()
    assert s.idle
    counts = s.pool.counts
    assert counts["free"] + counts["cached"] == counts["total"]
    return ended
