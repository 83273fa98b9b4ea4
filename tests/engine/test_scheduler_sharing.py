"""Blocks that several sequences hold: prompts that are known, continuations of one prompt, forks."""

from __future__ import annotations

import pytest

from herd.engine.blocks import BlockPool
from herd.engine.scheduler import Scheduler, StepPlan
from tests.engine.fake_model import VOCAB, FakeModel, expected, finish_all, request, scheduler


def test_shared_system_prompt_is_computed_once() -> None:
    s = scheduler()
    model = FakeModel(s)
    system = [5, 4, 3, 2, 1, 0, 1, 2, 3]
    s.add(request("a", [*system, 1, 1], 2))
    finish_all(s, model)
    (b,) = s.add(request("b", [*system, 6, 6], 2))
    plan = s.plan()
    assert [(c.start, c.count) for c in plan.rows] == [(8, 3)]
    assert b.cached_tokens == 8
    s.commit(plan, model.run(plan))
    ended = finish_all(s, model)
    assert ended["b", 0].reply == expected(b.request, 0, s.max_len)


def test_next_turn_reuses_the_reply() -> None:
    s = scheduler()
    model = FakeModel(s)
    (a,) = s.add(request("a", [1, 2, 3, 4, 5, 6], 10))
    finish_all(s, model)
    (b,) = s.add(request("b", [*a.tokens, 1, 2], 2))
    s.plan()
    assert b.cached_tokens == 12  # 16 tokens, the last without keys: three full blocks of four
    s.abort("b")


def test_whole_prompt_known_still_runs_one_token() -> None:
    s = scheduler()
    model = FakeModel(s)
    prompt = [1, 2, 3, 4, 5, 6, 1, 2]
    s.add(request("a", prompt))
    finish_all(s, model)
    (b,) = s.add(request("b", prompt))
    assert [(c.start, c.count) for c in s.plan().rows] == [(4, 4)]
    assert finish_all(s, model)["b", 0].reply == expected(b.request, 0, s.max_len)


def test_salts_and_adapters_do_not_share() -> None:
    s = scheduler()
    model = FakeModel(s)
    prompt = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    for i, own in enumerate(({}, {"salt": "tenant"}, {"adapter": "x"})):
        (sequence,) = s.add(request(f"r{i}", prompt, **own))
        ended = finish_all(s, model)
        assert sequence.cached_tokens == 0
        assert ended[f"r{i}", 0].reply == expected(sequence.request, 0, s.max_len)


def test_equal_prompts_that_arrive_together_are_read_once() -> None:
    """Sixteen requests with one system prompt in one go: it is computed once, and every reply is that of the request alone."""
    s = scheduler(256, max_seqs=16, max_tokens=64)
    model = FakeModel(s)
    system, rows = [5] * 10 + [6] * 31, 0
    for i in range(16):
        s.add(request(f"r{i}", [*system, i % 7, i // 7], max_tokens=4))
    ended = {}
    while not s.idle:
        plan = s.plan()
        if not rows:
            assert [chunk.sequence.request.id for chunk in plan.rows] == ["r0"], "the others wait for its blocks"
        rows += plan.tokens
        for progress in s.commit(plan, model.run(plan)):
            if progress.finish:
                ended[progress.sequence.request.id] = progress.sequence
        s.check()
    # The first prompt, three positions of each other one (40 of 43 are known), and three tokens that are read again.
    assert rows == 43 + 15 * 3 + 16 * 3
    for one in ended.values():
        assert one.reply == expected(one.request, 0, s.max_len)
        assert one.request.id == "r0" or one.cached_tokens == 40


@pytest.mark.parametrize("how", ["abort", "salt", "little", "no cache"])
def test_nobody_waits_for_blocks_that_will_not_help(how: str) -> None:
    s = Scheduler(BlockPool(64, 4, prefix_cache=how != "no cache"), max_seqs=4, max_tokens=16, max_len=64)
    model = FakeModel(s)
    prompt = list(range(1, 31))
    s.add(request("first", prompt))
    other = prompt[:8] + [40] * 20 if how == "little" else prompt
    s.add(request("second", other, **({"salt": "own"} if how == "salt" else {})))
    if how == "abort":
        model.step()
        s.abort("first")
        assert [chunk.sequence.request.id for chunk in s.plan().rows] == ["second"]
    else:
        s.max_tokens = 64
        assert [chunk.sequence.request.id for chunk in s.plan().rows] == ["first", "second"]
    s.commit(StepPlan(), [])
    finish_all(s, model)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_continuations_share_the_prompt_and_copy_on_write(length: int) -> None:
    s = scheduler()
    model = FakeModel(s)
    r = request("a", [1, 2, 3, 4, 5, 6, 1, 2, 3][:length], 6, n=4)
    sequences = s.add(r)
    assert len(sequences) == 4
    plan = s.plan()
    assert [(c.count, c.sample) for c in plan.rows] == [(length, True)]  # the prompt once
    s.commit(plan, model.run(plan))
    s.check()
    plan = s.plan()
    assert [c.count for c in plan.rows] == [1, 1, 1, 1]
    assert len(plan.copies) == (0 if length % 4 == 1 else 3)
    s.commit(plan, model.run(plan))
    ended = finish_all(s, model)
    for i in range(4):
        assert ended["a", i].reply == expected(r, i, s.max_len)


def test_a_dropped_plan_keeps_its_copies() -> None:
    s = scheduler()
    model = FakeModel(s)
    r = request("a", [1, 2, 3], 6, n=3)
    s.add(r)
    model.step()
    s.plan()  # never run
    s.check()
    ended = finish_all(s, model)
    assert [ended["a", i].reply for i in range(3)] == [expected(r, i, s.max_len) for i in range(3)]


def test_fork_in_the_middle() -> None:
    s = scheduler()
    model = FakeModel(s)
    (parent,) = s.add(request("a", [1, 2, 3], 9))
    for _ in range(3):
        model.step()
    child = s.fork(parent)
    s.check()
    assert (child.index, child.tokens) == (1, parent.tokens)
    child.tokens[-1] = (child.tokens[-1] + 1) % VOCAB  # another beam
    finish_all(s, model)
    assert parent.reply[:2] == child.reply[:2]
    assert parent.reply[2] != child.reply[2]
    assert s.add(request("a", [1]))  # the id is free again
