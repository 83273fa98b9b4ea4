"""Blocks of virtual tokens under the scheduler: where they lie, who shares them, what room they leave. Without numbers."""

from __future__ import annotations

import random

import pytest

from herd.engine.blocks import VIRTUAL, BlockPool
from herd.engine.request import Sequence
from herd.errors import ConfigError, ContextFullError
from tests.engine.fake_model import VOCAB, FakeModel, expected, request, scheduler

SIZE = 4


def test_pinned_blocks_are_counted_and_stay() -> None:
    pool = BlockPool(6, SIZE)
    pinned = pool.pin(2)
    assert pool.counts == {"free": 4, "cached": 0, "used": 0, "pinned": 2, "total": 6}
    pool.share(pinned)
    pool.check([pinned])
    pool.free(pinned)
    assert pool.available == 4
    with pytest.raises(AssertionError):
        pool.allocate(5)
    pool.share(pinned[:1])
    with pytest.raises(AssertionError, match="still used"):
        pool.unpin(pinned)
    pool.free(pinned[:1])
    pool.unpin(pinned)
    pool.check([])
    assert pool.counts == {"free": 6, "cached": 0, "used": 0, "pinned": 0, "total": 6}


def test_a_chain_begins_with_the_pinned_blocks() -> None:
    """What follows virtual tokens is found behind those of the same adapter, and nowhere else."""
    pool = BlockPool(8, SIZE)
    pinned, other = pool.pin(1), pool.pin(1)
    own = pool.allocate(1)
    ids = [VIRTUAL] * SIZE + [1, 2, 3, 4]
    before = pool.lookup(ids[:SIZE], adapter="a", pinned=pinned)
    assert before[0] == pinned
    pool.seal(own[0], before[1], ids[SIZE:], adapter="a")
    assert pool.lookup(ids, adapter="a", pinned=pinned)[0] == [*pinned, *own]
    assert pool.lookup(ids, adapter="b", pinned=other)[0] == other
    assert pool.lookup(ids, adapter="a", salt="x", pinned=pinned)[0] == pinned
    assert pool.lookup([1, 2, 3, 4], adapter="a")[0] == []
    assert pool.holds(pinned[0]) is None


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_replies_behind_virtual_tokens(count: int) -> None:
    """With their last block full and partly filled, in pieces, beside others, twice (the second time from the cache)."""
    s = scheduler(max_tokens=7)
    model = FakeModel(s)
    model.pin("a", count)
    asked = [request(f"r{i}", [1, 2, 3, 4, 5, 6, i][i % 5 :], 9, adapter="a" if i % 3 else None) for i in range(7)]
    for again in ("", " again"):
        for one in asked:
            s.add(request(one.id + again, list(one.prompt), 9, adapter=one.adapter))
        ended = finish(model)
        for one in asked:
            before = count if one.adapter else 0
            sequence = ended[one.id + again, 0]
            assert sequence.reply == expected(one, 0, s.room(one.adapter), before=before)
            assert (sequence.cached_tokens or 0) < len(one.prompt), "virtual tokens are no tokens"
            if again and len(one.prompt) == 7 and count % SIZE == 0:
                assert sequence.cached_tokens == SIZE
    s.unpin("a")
    s.pool.clear("a")
    assert s.pool.counts["pinned"] == 0


def finish(model: FakeModel) -> dict[tuple[str, int], Sequence]:
    """As `finish_all`, with blocks that stay."""
    ended = {}
    scheduler = model.scheduler
    while not scheduler.idle:
        for progress in model.step():
            if progress.finish:
                ended[progress.sequence.request.id, progress.sequence.index] = progress.sequence
        scheduler.check()
    counts = scheduler.pool.counts
    assert counts["used"] == 0
    assert counts["free"] + counts["cached"] + counts["pinned"] == counts["total"]
    return ended


def test_full_blocks_are_shared_and_the_last_one_is_copied() -> None:
    s = scheduler(blocks=32)
    model = FakeModel(s)
    model.pin("a", 2 * SIZE + 1)
    (pinned,) = [held.blocks for held in [s.pins.of("a")] if held]
    for name in ("x", "y"):
        s.add(request(name, [ord(name) % VOCAB, 1], adapter="a", salt=name))
    plan = s.plan()
    first, second = (chunk.blocks for chunk in plan.rows)
    assert first[:2] == second[:2] == pinned[:2]
    assert len({first[2], second[2], pinned[2]}) == 3
    assert sorted(plan.copies) == sorted([(pinned[2], first[2]), (pinned[2], second[2])])
    assert [(c.start, c.position, c.count) for c in plan.rows] == [(0, 9, 2), (0, 9, 2)]
    s.commit(plan, model.run(plan))
    finish(model)


def test_several_continuations_share_the_prompt_behind_them() -> None:
    s = scheduler()
    model = FakeModel(s)
    model.pin("a", 6)
    one = request("a", [1, 2, 3, 4, 5], 6, n=3, adapter="a")
    s.add(one)
    ended = finish(model)
    assert [ended["a", i].reply for i in range(3)] == [expected(one, i, s.room("a"), before=6) for i in range(3)]


def test_room_is_what_is_left_of_the_context() -> None:
    s = scheduler(blocks=32, max_len=20)
    model = FakeModel(s)
    assert s.room() == 20
    model.pin("a", 6)
    assert (s.room("a"), s.room(), s.room("unknown")) == (14, 20, 20)
    with pytest.raises(
        ContextFullError, match=r"14 tokens and the context holds 14 beside the 6 virtual tokens of adapter 'a'"
    ) as e:
        s.add(request("x", [1] * 14, adapter="a"))
    assert (e.value.needed, e.value.available) == (15, 14)
    one = request("x", [1] * 13, None, adapter="a")
    s.add(one)
    (found,) = finish(model).values()
    assert (len(found.tokens), found.finish) == (14, "context_full")
    s.add(request("y", [1] * 19, None))
    (found,) = finish(model).values()
    assert (len(found.tokens), found.finish) == (20, "context_full")


def test_a_cache_that_is_no_larger_than_the_context_leaves_others_less() -> None:
    """16 positions in 4 blocks: an adapter of 5 takes two, one of which is its own requests' anyway."""
    s = scheduler(blocks=4, max_len=16)
    model = FakeModel(s)
    s.add(request("early", [1, 2], 4))
    model.step()
    model.pin("a", 5)
    assert (s.room(), s.room("a")) == (8, 7)
    for name, adapter, room in (("x", None, 8), ("y", "a", 7)):
        s.add(one := request(name, [1, 2, 3], None, adapter=adapter))
        ended = finish(model)
        found = ended[name, 0]
        assert (len(found.tokens), found.finish) == (room, "context_full")
        assert found.reply == expected(one, 0, room, before=5 if adapter else 0)
    with pytest.raises(ConfigError, match="7 virtual tokens take 2 of the 2 blocks"):
        s.pin("b", 7)
    s.unpin("a")
    assert s.room() == 16


def test_refused_with_the_counts() -> None:
    s = scheduler(blocks=32, max_len=20)
    with pytest.raises(
        ConfigError, match="19 virtual tokens leave no room for a prompt and a reply in a context of 20"
    ):
        s.pin("a", 19)
    s.pin("a", 18)
    assert s.room("a") == 2
    assert s.pool.counts["pinned"] == 5
    tight = scheduler(blocks=8, max_len=32)
    model = FakeModel(tight)
    tight.add(request("long", [1] * 20, None))
    for _ in range(3):
        model.step()
    with pytest.raises(
        ConfigError, match=r"request 'long' has 22 tokens by now and needs the blocks that 12 virtual tokens"
    ):
        tight.pin("a", 12)
    assert tight.pool.counts["pinned"] == 0


def test_the_newest_give_their_blocks_back() -> None:
    s = scheduler(blocks=8, max_len=16, max_tokens=32)
    model = FakeModel(s)
    asked = [request(name, [i] * 11, 3) for i, name in enumerate(("old", "new"))]
    (old,), (new,) = (s.add(one) for one in asked)
    model.step()
    assert s.pool.available <= 2
    model.pin("a", 10)
    assert (old.preemptions, new.preemptions) == (0, 1)
    s.check()
    ended = finish(model)
    assert [ended[one.id, 0].reply for one in asked] == [expected(one, 0, 16) for one in asked]


def life(seed: int) -> int:
    """Requests and adapters come and go; every slot is checked in every step. How often somebody was preempted."""
    draw = random.Random(seed)
    s = scheduler(blocks=draw.randint(12, 40), max_seqs=5, max_tokens=draw.randint(5, 30), max_len=40)
    model = FakeModel(s)
    counts: dict[str, int] = {}
    asked = {}
    ended: dict[str, Sequence] = {}

    def step() -> None:
        for progress in model.step():
            if progress.finish:
                ended[progress.sequence.request.id] = progress.sequence
        s.check()

    for _ in range(60):
        act = draw.random()
        if act < 0.1:
            name = f"a{len(counts)}"
            try:
                model.pin(name, count := draw.randint(1, 14))
                counts[name] = count
            except ConfigError:
                assert name not in counts
        elif act < 0.45:
            adapter = draw.choice([None, *counts])
            prompt = [i % 3 for i in range(draw.randint(1, 20))]
            one = request(f"r{len(asked)}", prompt, draw.randint(1, 9), adapter=adapter)
            try:
                s.add(one)
                asked[one.id] = one
            except ContextFullError:
                assert len(prompt) >= s.room(adapter)
        else:
            step()
    while not s.idle:
        step()
    for id, one in asked.items():
        found, before = ended[id], counts.get(one.adapter or "", 0)
        whole = expected(one, 0, 40 - before, before=before)
        assert found.reply == whole[: len(found.reply)], id
        assert found.finish == "context_full" or found.reply == whole
    for name in counts:
        s.unpin(name)
    assert s.pool.available == s.pool.n_blocks
    return sum(found.preemptions for found in ended.values())


def test_random_lives() -> None:
    assert sum(life(seed) for seed in range(150)) > 20


def test_a_fork_goes_on_behind_the_same_virtual_tokens() -> None:
    """Between two steps, in the middle of the copied block: each writes its own."""
    s = scheduler()
    model = FakeModel(s)
    model.pin("a", 6)
    (parent,) = s.add(one := request("a", [1], 5, adapter="a"))
    model.step()
    child = s.fork(parent)
    s.check()
    assert (child.first, child.room, child.blocks) == (6, s.room("a"), parent.blocks)
    ended = finish(model)
    assert ended["a", 0].reply == expected(one, 0, s.room("a"), before=6)
    assert ended["a", 1].tokens[:2] == parent.tokens[:2]
    assert len(ended["a", 1].reply) == 5
