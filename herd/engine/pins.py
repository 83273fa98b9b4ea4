"""Blocks of virtual tokens: which adapters have some, and how much room requests have beside them. No torch.

An adapter of prefix or prompt tuning has keys and values of `count` positions that stand before everything its requests say. They
lie in pinned blocks for as long as it is loaded; its requests begin with these blocks, and others have so many fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from herd.engine.blocks import BlockPool, blocks_of
from herd.errors import ConfigError

__all__ = ["Pinned", "Pins"]


@dataclass(frozen=True, slots=True)
class Pinned:
    """The virtual tokens of an adapter, and the blocks that hold them, in order. The last one may have room for more."""

    count: int
    blocks: list[int]


class Pins:
    """The virtual tokens that lie in `pool`, by the names of their adapters. A request has at most `max_len` positions."""

    def __init__(self, pool: BlockPool, max_len: int) -> None:
        self.pool, self.max_len = pool, max_len
        self._held: dict[str, Pinned] = {}

    def of(self, adapter: str | None) -> Pinned | None:
        """The virtual tokens of an adapter; None for one that has none, and for none."""
        return None if adapter is None else self._held.get(adapter)

    def count(self, adapter: str | None) -> int:
        """How many virtual tokens an adapter has."""
        held = self.of(adapter)
        return 0 if held is None else held.count

    @property
    def blocks(self) -> int:
        """Blocks of all of them."""
        return sum(len(one.blocks) for one in self._held.values())

    def room(self, first: int, more: int = 0) -> int:
        """The most tokens of a request behind `first` virtual ones, prompt and reply together, with `more` blocks pinned.

        `max_len` positions, or as many as the blocks that are left hold: full ones of its own virtual tokens it has already.
        """
        size = self.pool.block_size
        left = self.pool.n_blocks - self.pool.pinned - more + first // size
        return min(self.max_len, left * size) - first

    def check(self, count: int) -> None:
        """Raise ConfigError with the counts when `count` more virtual tokens leave somebody no room for a prompt and a reply."""
        size = self.pool.block_size
        need, left = blocks_of(count, size), self.pool.n_blocks - self.pool.pinned
        if count + 2 > self.max_len:
            raise ConfigError(
                f"{count} virtual tokens leave no room for a prompt and a reply in a context of {self.max_len} tokens: open the "
                "model with a larger one (max_len)"
            )
        for first in {0, count, *(one.count for one in self._held.values())}:
            if self.room(first, need) < 2:
                raise ConfigError(
                    f"{count} virtual tokens take {need} of the {left} blocks of {size} tokens that are left, and requests with "
                    f"{first} virtual tokens would have no room: give the cache more memory, or unload another adapter"
                )

    def hold(self, adapter: str, count: int) -> list[int]:
        """Pin blocks for an adapter that has none. Callers have looked at `check`, and at what is available."""
        assert adapter not in self._held
        self._held[adapter] = Pinned(count, self.pool.pin(blocks_of(count, self.pool.block_size)))
        return list(self._held[adapter].blocks)

    def release(self, adapter: str) -> None:
        """Free the blocks of an adapter, which nobody reads any more."""
        self.pool.unpin(self._held.pop(adapter).blocks)
