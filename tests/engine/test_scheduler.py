from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.blocks import BlockPool
from herd.engine.request import Request, Sequence
from herd.engine.scheduler import Scheduler, StepPlan
from herd.errors import ConfigError, ContextFullError
from tests.engine.fake_model import VOCAB, FakeModel, chosen, expected, finish_all, request, scheduler


def test_decode_rows_first_then_chunks_in_order() -> None:
    s = scheduler(max_tokens=10)
    model = FakeModel(s)
    for name, length in (("a", 6), ("b", 9), ("c", 5)):
        s.add(request(name, [ord(name)] * length))

    def planned() -> list[tuple[str, int, int, bool]]:
        plan = s.plan()
        rows = [(c.sequence.request.id, c.start, c.count, c.sample) for c in plan.rows]
        s.commit(plan, model.run(plan))
        return rows

    assert planned() == [("a", 0, 6, True), ("b", 0, 4, False)]
    assert planned() == [("a", 6, 1, True), ("b", 4, 5, True), ("c", 0, 4, False)]
    assert planned() == [("a", 7, 1, True), ("b", 9, 1, True), ("c", 4, 1, True)]


def test_replies_are_those_of_one_request_alone() -> None:
    s = scheduler(blocks=64, max_seqs=16, max_tokens=24)
    model = FakeModel(s)
    requests = [request(f"r{i}", [i % 3] * (1 + 3 * i), 20, stop_ids=frozenset({i % VOCAB})) for i in range(12)]
    for r in requests:
        s.add(r)
    ended = finish_all(s, model)
    for r in requests:
        assert ended[r.id, 0].reply == expected(r, 0, s.max_len)


def test_part_of_a_plan_can_be_committed() -> None:
    """What an engine does when one request fails in a step."""
    s = scheduler()
    model = FakeModel(s)
    (a,), (b,) = s.add(request("a", [1, 2])), s.add(request("b", [3]))
    plan = s.plan()
    sampled = model.run(plan)
    s.commit(StepPlan(plan.rows[1:]), sampled[1:])
    assert (a.computed, b.computed) == (0, 1)
    s.finish(a, "error")
    assert finish_all(s, model)["b", 0].reply == expected(b.request, 0, s.max_len)


def test_preemption_takes_the_newest_and_loses_nothing() -> None:
    s = scheduler(blocks=8, max_len=32, max_tokens=32)
    model = FakeModel(s)
    requests = [request(name, [i + 1] * 8, 20) for i, name in enumerate("abc")]
    a, b, c = (s.add(r)[0] for r in requests)
    ended = finish_all(s, model)
    assert a.preemptions == 0
    assert b.preemptions + c.preemptions > 0
    assert list(ended) == [("a", 0), ("b", 0), ("c", 0)]  # first come, first served
    for r in requests:
        assert ended[r.id, 0].reply == expected(r, 0, s.max_len)


def test_a_row_of_the_plan_is_taken_back_by_an_older_prompt() -> None:
    """A decode row is planned first; then the prompt of an older request needs its blocks in the same step. The older one runs
    later than the newer because the continuation that read its prompt failed."""
    s = scheduler(blocks=8, max_tokens=32, max_len=32)
    model = FakeModel(s)
    first, second = s.add(request("a", [1] * 20, 4, n=2))
    (b,) = s.add(request("b", [2] * 4, 12))
    plan = s.plan()
    sampled = model.run(plan)
    assert [c.sequence for c in plan.rows] == [first, b]
    s.commit(StepPlan(plan.rows[1:]), sampled[1:])
    s.finish(first, "error")
    s.max_tokens = 3
    ended = finish_all(s, model)
    assert b.preemptions == 1
    for sequence in (second, b):
        assert ended[sequence.request.id, sequence.index].reply == expected(sequence.request, sequence.index, s.max_len)


def test_pressure_64_blocks_32_long_requests() -> None:
    s = scheduler(blocks=64, size=4, max_seqs=16, max_tokens=32, max_len=128)
    model = FakeModel(s)
    requests = [request(f"r{i}", [i % VOCAB, 1, 2] * 10, None) for i in range(32)]
    for r in requests:
        s.add(r)
    ended = finish_all(s, model, 10_000)
    assert {sequence.finish for sequence in ended.values()} == {"context_full"}
    assert all(ended[r.id, 0].reply == expected(r, 0, s.max_len) for r in requests)


def test_nobody_passes_the_first_in_line() -> None:
    """A long prompt that has to wait for blocks is not starved by short ones behind it."""
    s = scheduler(blocks=16, max_seqs=4, max_tokens=16, max_len=64)
    model = FakeModel(s)
    s.add(request("first", [1] * 8, 30))
    model.step()
    s.add(request("long", [2] * 50, 4))
    s.add(request("short", [3] * 2, 2))
    begun = []
    while not s.idle:
        plan = s.plan()
        begun += [c.sequence.request.id for c in plan.rows if c.start == 0]
        s.commit(plan, model.run(plan))
    assert begun == ["long", "short"]


def test_no_more_at_once_than_max_seqs() -> None:
    """Continuations count from the start, beams as many as they may become."""
    s = scheduler(max_seqs=3)
    model = FakeModel(s)
    s.add(request("a", [1] * 3, 2, n=2))
    for name in "bc":
        s.add(request(name, [2], 8))
    s.add(request("beams", [3], 4, beams=3, temperature=0))
    s.add(request("d", [4], 2))

    def running() -> set[str]:
        model.step()
        s.check()
        return {sequence.request.id for sequence in s.running}

    assert running() == {"a", "b"}
    assert running() == {"a", "b"}
    seen = [running() for _ in range(12)]
    assert seen[0] == {"b", "c"}
    assert {"beams"} in seen
    assert not any("beams" in one and len(one) > 1 for one in seen)
    finish_all(s, model)


def test_a_spare_block_for_each_running_sequence() -> None:
    """Let in without one, the newer would be thrown out when the older needs its next block."""
    for blocks, inside in ((4, False), (5, True)):
        s = scheduler(blocks=blocks, max_len=16)
        model = FakeModel(s)
        s.add(request("a", [1] * 7))
        model.step()
        (b,) = s.add(request("b", [2] * 8))
        s.plan()
        assert (b.status == "running") == inside


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_drafts_are_taken_as_far_as_they_are_right(right: int) -> None:
    s = scheduler()
    model = FakeModel(s)
    (a,) = s.add(request("a", [1, 2], 20))
    model.step()
    truth = expected(a.request, 0, s.max_len)
    a.drafts = tuple(truth[1 : 1 + right]) + ((truth[1 + right] + 1) % VOCAB,) * (3 - right)
    plan = s.plan()
    (chunk,) = plan.rows
    assert (chunk.count, chunk.logits, chunk.tokens[0]) == (4, 4, truth[0])
    (progress,) = s.commit(plan, model.run(plan))
    assert len(progress.tokens) == right + 1
    assert a.computed == len(a.tokens) - 1
    assert a.drafts == ()
    s.check()
    assert finish_all(s, model)["a", 0].reply == truth


def test_drafts_respect_every_limit() -> None:
    s = scheduler(blocks=6, max_tokens=4, max_len=12)
    model = FakeModel(s)
    (a,), (b,) = s.add(request("a", [1], 3)), s.add(request("b", [2], None))
    model.step()
    a.drafts = b.drafts = tuple(range(6))
    counts = [c.count for c in s.plan().rows]
    assert counts[0] == 2  # one more may follow after this token: max_tokens 3, one made, one sampled after the draft
    assert sum(counts) <= 4
    for _ in range(30):
        for sequence in (a, b):
            sequence.drafts = tuple(expected(sequence.request, 0, s.max_len)[sequence.made :])
        model.step()
        s.check()
    for sequence in (a, b):
        assert sequence.reply == expected(sequence.request, 0, s.max_len)


def test_tokens_after_a_stop_are_taken_back() -> None:
    s = scheduler()
    model = FakeModel(s)
    truth = expected(request("a", [1, 2], 6), 0, 64)
    stop = truth[2]
    (a,) = s.add(request("a", [1, 2], 6, stop_ids=frozenset({stop})))
    model.step()
    if a.status == "running":
        a.drafts = tuple(truth[1:4])
        model.step()
    assert a.finish == "stop"
    assert a.reply == truth[: truth.index(stop) + 1]
    assert s.idle


def test_prompt_logits_are_wanted_once() -> None:
    s = scheduler(blocks=8, max_tokens=6, max_seqs=2, max_len=32)
    model = FakeModel(s)
    prompt = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    s.add(request("before", prompt))
    finish_all(s, model)
    (a,) = s.add(request("a", prompt, prompt_logprobs=0))
    wanted = []
    while not s.idle:
        plan = s.plan()
        wanted += [(c.start + c.count - c.logits, c.start + c.count) for c in plan.rows if c.logits]
        s.commit(plan, model.run(plan))
    assert wanted[:2] == [(0, 6), (6, 10)]  # no cached block is used for it
    assert all(stop - start == 1 for start, stop in wanted[2:])
    assert a.cached_tokens == 0


def test_abort_at_every_moment() -> None:
    s = scheduler(blocks=8, max_seqs=2, max_len=32)
    model = FakeModel(s)
    assert s.abort("unknown") == []
    (a,) = s.add(request("a", [1] * 6))
    s.add(request("b", [2] * 6))
    s.add(request("c", [3] * 6))
    s.plan()
    assert s.abort("c")[0].finish == "abort"  # waiting
    plan = s.plan()
    assert s.abort("a") == [a]  # between plan and commit
    assert s.abort("a") == []
    assert plan.rows[0].blocks  # the plan can still be run
    (again,) = s.add(request("a", [4] * 3))  # the same id, before the old plan is committed
    assert [p.sequence.request.id for p in s.commit(plan, model.run(plan))] == ["b"]
    assert again.computed == 0
    s.check()
    s.abort("b")  # running
    ended = finish_all(s, model)
    assert s.abort("a") == []  # finished
    assert list(ended) == [("a", 0)]


def test_one_continuation_can_fail_alone() -> None:
    s = scheduler()
    model = FakeModel(s)
    r = request("a", [1] * 9, 4, n=3)
    first, second, _ = s.add(r)
    s.finish(first, "error")  # before its prompt was read: the next one reads it
    ended = finish_all(s, model)
    assert sorted(ended) == [("a", 1), ("a", 2)]
    assert second.reply == expected(r, 1, s.max_len)
    first, second, third = s.add(r)
    s.finish(second, "error")
    model.step()
    s.check()
    assert s.finish(third, "stop")
    assert not s.finish(third, "stop")
    assert list(finish_all(s, model)) == [("a", 0)]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"needs 17 blocks .* has 16: lower it to 64"):
        scheduler(blocks=16, max_len=65)
    with pytest.raises(ConfigError, match="every sequence needs a row"):
        scheduler(max_seqs=8, max_tokens=7)
    with pytest.raises(ConfigError):
        scheduler(max_len=1)
    s = scheduler()
    with pytest.raises(ContextFullError, match="has 64 tokens and the context holds 64") as caught:
        s.add(request("a", [1] * 64))
    assert (caught.value.needed, caught.value.available) == (65, 64)
    with pytest.raises(ConfigError, match="asks for 5 continuations, and at most 4"):
        s.add(request("a", [1], n=5))
    s.add(request("a", [1]))
    with pytest.raises(ConfigError, match="already running"):
        s.add(request("a", [2]))
    with pytest.raises(ConfigError, match="no tokens"):
        request("b", [])
    with pytest.raises(ConfigError, match="needs an id"):
        request("", [1])


def test_a_wrong_commit_is_caught() -> None:
    s = scheduler()
    s.add(request("a", [1, 2]))
    plan = s.plan()
    with pytest.raises(AssertionError, match="were sampled"):
        s.commit(plan, [[]])
    s.commit(plan, [[1]])
    with pytest.raises(AssertionError, match="committed twice"):
        s.commit(plan, [[1]])


Ops = st.lists(st.tuples(st.sampled_from("aaasssssdxefp"), st.integers(0, 2**16)), max_size=40)


CASES = {
    "blocks": st.integers(4, 20),
    "size": st.integers(1, 5),
    "seqs": st.integers(1, 5),
    "extra": st.integers(0, 12),
    "prefix_cache": st.booleans(),
    "ops": Ops,
}


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(**CASES)
def test_any_order_of_events(**case: Any) -> None:
    happen(**case)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, derandomize=True, database=None)
@given(**CASES)
def test_any_order_of_many_more_events(**case: Any) -> None:
    happen(**case)


def happen(blocks: int, size: int, seqs: int, extra: int, prefix_cache: bool, ops: list[tuple[str, int]]) -> None:
    """Requests, aborts, failures, steps (with drafts or without), forks and dropped plans in any order: every invariant holds
    after each, and everybody finishes with the reply that it would have had alone."""
    s = Scheduler(
        BlockPool(blocks, size, prefix_cache=prefix_cache), max_seqs=seqs, max_tokens=seqs + extra, max_len=blocks * size
    ) if blocks * size > 1 else scheduler()  # fmt: skip
    model = FakeModel(s)
    ended: dict[tuple[str, int], Sequence] = {}
    added: dict[str, Request] = {}
    aborted: set[str] = set()

    def step() -> None:
        for progress in model.step():
            if progress.finish:
                ended[progress.sequence.request.id, progress.sequence.index] = progress.sequence

    for i, (op, number) in enumerate(ops):
        draw = random.Random(number)
        if op == "a":
            length = draw.randint(1, max(1, min(3 * size, s.max_len - 1)))
            r = request(
                f"r{i}",
                [draw.randrange(2)] * (length // 2) + [draw.randrange(VOCAB) for _ in range(length - length // 2)],
                draw.choice([1, 4, 12, None]),
                n=draw.randint(1, seqs),
                stop_ids=frozenset(draw.sample(range(VOCAB), draw.randrange(2))),
                salt=draw.choice(["", "", "x"]),
                adapter=draw.choice([None, None, "y"]),
            )
            s.add(r)
            added[r.id] = r
        elif op == "x" and added:
            name = draw.choice(sorted(added))
            if s.abort(name):
                aborted.add(name)
        elif op == "f" and s.running:
            parent = draw.choice(s.running)
            if parent.made:  # as beam search does, after a step
                s.fork(parent)
        elif op == "e" and s.running:
            failed = draw.choice(s.running)
            s.finish(failed, "error")
            ended[failed.request.id, failed.index] = failed
        elif op == "p":
            s.plan()
        else:
            if op == "d":
                for sequence in s.running:
                    truth = expected(sequence.request, sequence.index, s.max_len, stop=False)[sequence.made :]
                    right = draw.randrange(6)
                    sequence.drafts = (*truth[:right], *(draw.randrange(VOCAB) for _ in range(2)))
            step()
        s.check()
    for _ in range(20_000):
        if s.idle:
            break
        step()
    assert s.idle
    s.check()
    assert s.pool.available == s.pool.n_blocks
    for name, r in added.items():
        for index in range(r.params.candidates):
            if name not in aborted:
                reply, truth = ended[name, index].reply, expected(r, index, s.max_len)
                assert reply == (truth[: len(reply)] if ended[name, index].finish == "error" else truth)


def test_the_same_events_give_the_same_steps() -> None:
    def steps() -> list[list[tuple[str, int, int, int, list[int]]]]:
        s = scheduler(blocks=12, max_len=40)
        model = FakeModel(s)
        draw = random.Random(7)
        out = []
        for i in range(60):
            if i % 5 == 0:
                s.add(request(f"r{i}", [draw.randrange(3) for _ in range(draw.randint(1, 20))], 12, n=1 + i % 3))
            if i % 17 == 16:
                s.abort(f"r{i - i % 5 - 5}")
            plan = s.plan()
            out.append([(c.sequence.request.id, c.sequence.index, c.start, c.count, list(c.blocks)) for c in plan.rows])
            s.commit(plan, model.run(plan))
        return out

    assert steps() == steps()


def test_chosen_spreads() -> None:
    """The fake model is no constant: continuations differ."""
    assert len({chosen(123, i) for i in range(20)}) > 3
