"""What one step computes, and what it gave: pieces of sequences, copies of blocks. Ids only, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from herd.engine.request import Finish, Sequence

__all__ = ["Chunk", "Progress", "StepPlan"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` .. `start + count` of one sequence, the last len(drafts) of them guesses, behind `before` virtual ones.

    The logits of its last `logits` rows are wanted. `sample`: a token follows the last row (with drafts: one per row of the last
    1 + len(drafts), as far as the guesses were right). `blocks` are those of the plan, whatever happens to the sequence since.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool
    logits: int
    blocks: list[int]
    drafts: tuple[int, ...] = ()
    before: int = 0

    @property
    def position(self) -> int:
        """The position of the first of them."""
        return self.start + self.before

    @property
    def tokens(self) -> list[int]:
        """The ids to run."""
        known = self.sequence.tokens[self.start : self.start + self.count - len(self.drafts)]
        return [*known, *self.drafts]


@dataclass(slots=True)
class StepPlan:
    """One step: `copies` (from block, to block) come first and in order, then `rows` in one forward."""

    rows: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Positions computed in this step."""
        return sum(chunk.count for chunk in self.rows)

    def copy(self, make: Callable[[list[tuple[int, int]]], None]) -> None:
        """Have `make` do the copies that are still due. Done twice they may be wrong: a block can be read, given back and written
        in one step."""
        if self.copies:
            make(self.copies)
            self.copies.clear()


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step gave one sequence: new `tokens`, and why it ended with the last of them, if it did."""

    sequence: Sequence
    tokens: list[int]
    finish: Finish | None
