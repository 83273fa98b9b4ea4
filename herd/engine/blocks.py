"""Blocks of the paged cache: who uses which, which hold a prefix that can be used again, which are free. Ids only, no torch.

A block holds the keys and values of `block_size` neighbouring positions. Every block is in exactly one state:

    free     nobody uses it, nothing in it is worth keeping
    cached   nobody uses it, but it holds a known full block of tokens; given up least recently used first
    used     counted references; may hold a known block too
    pinned   holds virtual tokens of an adapter for as long as it is loaded, whoever reads them; never known, never written again

A full block is known by its digest: keyed blake2b over the digest of the block before it and its own token ids, the chain
starting from salt and adapter; virtual tokens count as VIRTUAL. The key is random per process, so nobody outside can find
collisions, and a hit is believed only when ids, salt and adapter are equal as well.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from herd.errors import ConfigError

__all__ = ["VIRTUAL", "BlockPool", "blocks_of"]

VIRTUAL = -1
"""What stands in the place of an id where a position has none: those before an adapter's first token."""


def blocks_of(positions: int, block_size: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // block_size)


class _Known(NamedTuple):
    """What a full block holds, and after what."""

    digest: bytes
    before: bytes
    tokens: tuple[int, ...]
    salt: str
    adapter: str | None


class BlockPool:
    """`n_blocks` blocks of `block_size` positions, with reference counts and a cache of prefixes.

    `prefix_cache=False` forgets every block as soon as it is free. Raises ConfigError for sizes below one.
    """

    def __init__(self, n_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        if n_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"a cache of {n_blocks} blocks of {block_size} positions holds nothing: give at least 1 of 1"
            )
        self.n_blocks, self.block_size, self.prefix_cache = n_blocks, block_size, prefix_cache
        self._key = os.urandom(32)
        self._refs = [0] * n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._known: list[_Known | None] = [None] * n_blocks
        self._by_digest: dict[bytes, int] = {}
        self._pinned: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> dict[str, int]:
        """{"free", "cached", "used", "pinned", "total"} in blocks. When nothing runs none is used."""
        free, cached, pinned = len(self._free), len(self._cached), len(self._pinned)
        used = self.n_blocks - free - cached - pinned
        return {"free": free, "cached": cached, "used": used, "pinned": pinned, "total": self.n_blocks}

    @property
    def pinned(self) -> int:
        """How many blocks hold virtual tokens."""
        return len(self._pinned)

    def references(self, block: int) -> int:
        """How many sequences use `block`."""
        return self._refs[block]

    def holds(self, block: int) -> tuple[int, ...] | None:
        """The tokens that `block` is known to hold; None when nobody can find it."""
        known = self._known[block]
        return None if known is None else known.tokens

    def allocate(self, n: int) -> list[int]:
        """`n` blocks with one reference each; the least recently used cached ones are given up when no others are free.

        Callers look at `available` first.
        """
        assert n <= self.available, f"{n} blocks asked for, {self.available} there"
        taken = []
        for _ in range(n):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self.forget(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def pin(self, n: int) -> list[int]:
        """`n` blocks that stay until `unpin`, whoever shares and frees them. Callers look at `available` first."""
        blocks = self.allocate(n)
        self._pinned.update(blocks)
        return blocks

    def unpin(self, blocks: Sequence[int]) -> None:
        """They are blocks like any others again; nobody uses them any more."""
        assert all(self._refs[block] == 1 for block in blocks), f"pinned blocks {blocks} are still used"
        self._pinned.difference_update(blocks)
        self.free(blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of `blocks`, used or cached."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]  # a KeyError here: a free block was shared
            self._refs[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One reference fewer to each of `blocks` (in the order of their positions): the last ones are given up first."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is freed by somebody who does not hold it"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._known[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def lookup(
        self, tokens: Sequence[int], *, salt: str = "", adapter: str | None = None, pinned: Sequence[int] = ()
    ) -> tuple[list[int], list[bytes]]:
        """Blocks and digests of the longest known prefix of `tokens`; full blocks only. Gives no reference: `share` them.

        `pinned` blocks hold what `tokens` begin with: as many blocks of VIRTUAL.
        """
        blocks: list[int] = []
        digests: list[bytes] = []
        if not self._by_digest and not pinned:
            return blocks, digests
        before = self._root(salt, adapter)
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            part = tuple(tokens[start : start + self.block_size])
            digest = self._digest(before, part)
            if len(blocks) < len(pinned):
                block = pinned[len(blocks)]
            else:
                found = self._by_digest.get(digest)
                if found is None or self._known[found] != _Known(digest, before, part, salt, adapter):
                    break
                block = found
            blocks.append(block)
            digests.append(digest)
            before = digest
        return blocks, digests

    def seal(
        self, block: int, digests: Sequence[bytes], tokens: Sequence[int], *, salt: str = "", adapter: str | None = None
    ) -> bytes:
        """Remember that the used `block` holds `tokens` (exactly one block) after the blocks of `digests`. Returns its digest.

        When another block is known to hold the same, that one stays the known one.
        """
        assert len(tokens) == self.block_size
        before = digests[-1] if digests else self._root(salt, adapter)
        part = tuple(tokens)
        digest = self._digest(before, part)
        if self.prefix_cache and digest not in self._by_digest:
            assert self._known[block] is None
            self._known[block] = _Known(digest, before, part, salt, adapter)
            self._by_digest[digest] = block
        return digest

    def forget(self, block: int) -> None:
        """`block` is about to be written: what it held is not known any more. It must not be a cached one."""
        known = self._known[block]
        if known is not None:
            self._known[block] = None
            del self._by_digest[known.digest]

    def clear(self, adapter: str | None = None) -> int:
        """Forget every known prefix (of one adapter): after its weights changed, or the model's. Returns how many blocks.

        No sequence that uses those weights may be running: what it has computed would become known again.
        """
        count = 0
        for block, known in enumerate(self._known):
            if known is None or (adapter is not None and known.adapter != adapter):
                continue
            self.forget(block)
            count += 1
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)
        return count

    def check(self, users: Iterable[Sequence[int]]) -> None:
        """Assert that counts and references are those of `users`, the block lists of all sequences."""
        refs = Counter(block for blocks in users for block in blocks)
        refs.update(self._pinned)
        assert all(self._known[block] is None for block in self._pinned), "a pinned block is known"
        used = {block for block in range(self.n_blocks) if self._refs[block]}
        assert all(self._refs[block] == n for block, n in refs.items()), "a reference count differs from the users"
        assert used == set(refs), f"blocks {sorted(used ^ set(refs))} are leaked or used without a reference"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        free, cached = set(self._free), set(self._cached)
        assert not free & cached, f"blocks {sorted(free & cached)} are free and cached"
        assert not (free | cached) & used, f"blocks {sorted((free | cached) & used)} are used and free"
        assert len(free) + len(cached) + len(used) == self.n_blocks, "blocks are lost"
        assert all(self._known[block] is None for block in free), "a free block is known"
        assert all(self._known[block] is not None for block in cached), "a cached block holds nothing known"
        known = {k.digest: block for block, k in enumerate(self._known) if k is not None}
        assert known == self._by_digest, "the table of digests differs from the blocks"

    def _root(self, salt: str, adapter: str | None) -> bytes:
        """What the chain starts from. Lengths go first, so that no two pairs give the same bytes."""
        name = b"" if adapter is None else b"+" + adapter.encode("utf-8", "surrogatepass")
        text = salt.encode("utf-8", "surrogatepass")
        return self._blake(len(text).to_bytes(8, "little") + text + name)

    def _digest(self, before: bytes, tokens: Sequence[int]) -> bytes:
        return self._blake(before + array("q", tokens).tobytes())

    def _blake(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._key, digest_size=32).digest()
