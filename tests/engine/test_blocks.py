from __future__ import annotations

import pytest

from herd.engine.blocks import BlockPool, blocks_of
from herd.errors import ConfigError


def held(pool: BlockPool, tokens: list[int], **root: str) -> list[int]:
    """Blocks that hold `tokens`, all full ones known."""
    blocks = pool.allocate(blocks_of(len(tokens), pool.block_size))
    digests: list[bytes] = []
    for i in range(len(tokens) // pool.block_size):
        part = tokens[i * pool.block_size : (i + 1) * pool.block_size]
        digests.append(pool.seal(blocks[i], digests, part, **root))
    return blocks


def test_sizes_are_refused() -> None:
    for sizes in ((0, 16), (4, 0), (-1, 16)):
        with pytest.raises(ConfigError, match="holds nothing"):
            BlockPool(*sizes)


def test_states_and_counts() -> None:
    pool = BlockPool(5, 4)
    blocks = held(pool, list(range(10)))
    assert pool.counts == {"free": 2, "cached": 0, "used": 3, "pinned": 0, "total": 5}
    pool.check([blocks])
    pool.free(blocks)
    assert pool.counts == {"free": 3, "cached": 2, "used": 0, "pinned": 0, "total": 5}
    assert pool.available == 5
    pool.check([])


def test_longest_known_prefix() -> None:
    pool = BlockPool(8, 4)
    blocks = held(pool, list(range(12)))
    for tokens, n in (
        (list(range(12)), 3),
        (list(range(11)), 2),
        (list(range(20)), 3),
        ([0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11], 1),  # the third block is the same, what is before it is not
        ([9, 1, 2, 3, 4, 5, 6, 7], 0),
        ([0, 1, 2], 0),
    ):
        found, digests = pool.lookup(tokens)
        assert found == blocks[:n]
        assert len(digests) == n


def test_salt_and_adapter_part_prefixes() -> None:
    pool = BlockPool(16, 4)
    tokens = list(range(8))
    roots = [{}, {"salt": "a"}, {"adapter": "a"}, {"salt": "a", "adapter": "a"}, {"adapter": ""}, {"salt": "a+a"}]
    blocks = [held(pool, tokens, **root) for root in roots]
    for root, own in zip(roots, blocks, strict=True):
        assert pool.lookup(tokens, **root)[0] == own
    assert pool.lookup(tokens, salt="b")[0] == []


def test_ids_are_compared_on_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest that collides must not be believed."""
    pool = BlockPool(8, 4)
    monkeypatch.setattr(pool, "_blake", lambda data: b"the same for all")
    held(pool, [1, 2, 3, 4])
    assert pool.lookup([1, 2, 3, 4])[0]
    assert pool.lookup([1, 2, 3, 5])[0] == []
    assert pool.lookup([1, 2, 3, 4], salt="other")[0] == []


def test_digests_cannot_be_foreseen() -> None:
    """Two pools (two processes) give the same tokens different digests."""
    one, other = BlockPool(2, 2), BlockPool(2, 2)
    assert one.seal(one.allocate(1)[0], [], [1, 2]) != other.seal(other.allocate(1)[0], [], [1, 2])


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, 2)
    old, new = held(pool, [1, 2, 3, 4]), held(pool, [5, 6, 7, 8])
    pool.free(old)
    pool.free(new)
    assert pool.lookup([1, 2, 3, 4])[0] == old
    first = pool.allocate(1)
    assert first == [old[1]]  # the tail of the older one
    assert pool.lookup([1, 2, 3, 4])[0] == old[:1]
    pool.share(old[:1])  # a use makes it the newest
    pool.free(old[:1])
    assert pool.allocate(2) == [new[1], new[0]]
    assert pool.lookup([1, 2, 3, 4])[0] == old[:1]
    pool.check([first, new])


def test_references() -> None:
    pool = BlockPool(3, 2)
    blocks = held(pool, [1, 2])
    pool.share(blocks)
    assert pool.references(blocks[0]) == 2
    pool.check([blocks, blocks])
    pool.free(blocks)
    pool.check([blocks])
    pool.free(blocks)
    with pytest.raises(AssertionError, match="does not hold it"):
        pool.free(blocks)
    with pytest.raises(AssertionError):
        pool.allocate(4)


def test_check_finds_leaks_and_wrong_counts() -> None:
    pool = BlockPool(3, 2)
    blocks = pool.allocate(2)
    for users in ([], [blocks[:1]], [blocks, blocks]):
        with pytest.raises(AssertionError):
            pool.check(users)


def test_clear() -> None:
    pool = BlockPool(8, 2)
    plain, tuned = held(pool, [1, 2, 3, 4]), held(pool, [1, 2, 3, 4], adapter="x")
    pool.free(plain)
    assert pool.clear("x") == 2
    assert pool.lookup([1, 2, 3, 4], adapter="x")[0] == []
    assert pool.lookup([1, 2, 3, 4])[0] == plain
    assert pool.clear() == 2
    pool.check([tuned])
    assert pool.counts["cached"] == 0


def test_without_prefix_cache() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    blocks = held(pool, [1, 2, 3, 4])
    assert pool.lookup([1, 2, 3, 4])[0] == []
    pool.free(blocks)
    assert pool.counts["free"] == 4
