import hashlib
import json

import numpy as np
import pytest

from herd.data.batch import Loader
from herd.data.config import StagePart
from herd.data.mix import Mixture, MixtureSource
from herd.data.pack import Rows, pack_stream
from herd.errors import DataError


def numbered(count: int, first: int = 0) -> Rows:
    tokens = np.arange(first, first + count, dtype=np.int32)[:, None]
    return Rows(tokens, tokens, np.zeros_like(tokens))


STAGES = (
    StagePart(until=0.5, weights={"a": 1}),
    StagePart(until=0.75, weights={"a": 1, "b": 1}),
    StagePart(until=1, weights={"b": 1, "c": 3}),
)


def mixture(total: int | None = 800, stages=STAGES, seed: int = 3) -> Mixture:
    sources = [
        MixtureSource("a", numbered(100), 2),
        MixtureSource("b", numbered(30, 1000), 1, max_epochs=4),
        MixtureSource("c", numbered(7, 2000), 1),
    ]
    return Mixture(sources, seed=seed, stages=stages, total=total)


def drawn(loader: Loader, batches: int) -> list[int]:
    return [row for _ in range(batches) for row in loader.draw().tokens.flatten().tolist()]


def stream(parts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps([i for part in parts for i in part]).encode()).hexdigest()


def test_an_epoch_gives_every_row_once_and_epochs_differ():
    loader = Loader(numbered(12), 4, seed=3)
    first, second = drawn(loader, 3), drawn(loader, 3)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_the_stream_is_one_whatever_draws_it():
    """The same hash of the rows in their order over workers, ranks, interruptions, and batch sizes."""
    whole = stream([drawn(Loader(mixture(), 8), 100)])
    assert whole == stream([drawn(Loader(mixture(), 1, workers=2), 800)])
    for workers in (1, 2, 3):
        assert whole == stream([drawn(Loader(mixture(), 8, workers=workers), 100)])
    for world in (2, 4):
        ranks = [Loader(mixture(), 8 // world, rank=rank, world=world, workers=rank % 3) for rank in range(world)]
        assert whole == stream([drawn(rank, 1) for _ in range(100) for rank in ranks])
    parts: list[list[int]] = []
    state = Loader(mixture(), 8).state
    for batches, workers in ((1, 0), (49, 2), (13, 1), (0, 2), (37, 0)):
        loader = Loader(mixture(), 8, workers=workers)
        loader.restore(json.loads(json.dumps(state)))
        parts.append(drawn(loader, batches))
        state = loader.state
    assert whole == stream(parts)
    assert whole != stream([drawn(Loader(mixture(seed=4), 8), 100)])


def test_a_run_goes_on_with_another_number_of_ranks():
    before = [Loader(mixture(), 4, rank=rank, world=2) for rank in range(2)]
    first = [drawn(loader, 1) for _ in range(10) for loader in before]
    alone = Loader(mixture(), 8)
    alone.restore(before[1].state)
    assert stream([drawn(Loader(mixture(), 8), 20)]) == stream([*first, drawn(alone, 10)])


def test_a_row_of_the_far_future_costs_what_the_first_costs():
    loader = Loader(mixture(total=None, stages=()), 2)
    loader.restore({**loader.state, "position": 10**14})
    assert len(drawn(loader, 1)) == 2


def test_stages_have_their_sources_and_shares():
    rows = np.array(drawn(Loader(mixture(), 8), 100))
    assert (rows[:400] < 1000).all()
    middle = rows[400:600]
    assert abs(int((middle < 1000).sum()) - 100) <= 2
    assert abs(int(((middle >= 1000) & (middle < 2000)).sum()) - 100) <= 2
    assert abs(int((rows[600:] >= 2000).sum()) - 150) <= 2
    assert (rows[600:] >= 1000).all()
    # Sources go on where they were: 500 rows of `a` in all are five whole epochs.
    assert (np.bincount(rows[rows < 1000]) == 5).all()


def test_stages_of_a_run_in_minutes_begin_when_it_says_so():
    loader = Loader(mixture(total=None), 8, workers=2)
    first = drawn(loader, 10)
    loader.advance(0.3)
    first += drawn(loader, 5)
    assert max(first) < 1000
    loader.advance(0.5)
    assert loader.notes()[-1] == "data: stage 2 of 3 begins at row 120"
    second = drawn(loader, 10)
    assert abs(sum(row >= 1000 for row in second) - 40) <= 2
    state = json.loads(json.dumps(loader.state))
    assert state["starts"] == [0, 120]
    again = Loader(mixture(total=None), 8)
    again.restore(state)
    loader.advance(0.9)
    again.advance(0.9)
    third = drawn(loader, 10)
    assert third == drawn(again, 10)
    assert min(third) >= 1000


def test_stages_that_were_passed_over_are_begun_and_left():
    loader = Loader(mixture(total=None), 8)
    loader.advance(1.0)
    assert loader.state["starts"] == [0, 0, 0]
    assert min(drawn(loader, 5)) >= 1000


def test_more_epochs_than_asked_are_said_each_time_they_double():
    loader = Loader(mixture(), 8)
    said = []
    for _ in range(100):
        loader.draw()
        said += loader.notes()
    # a: 500 rows of 100 (asked: one epoch), b: 150 of 30 (asked: four), c: 150 of 7.
    ask = "; max_epochs says how often is fine"
    assert said == [
        f"data: read again: {read}{ask}"
        for read in (
            "a for the 2nd time",
            "a for the 4th time",
            "a for the 5th time, c for the 2nd time",
            "a for the 5th time, c for the 8th time",
            "a for the 5th time, b for the 5th time (max_epochs is 4), c for the 10th time",
            "a for the 5th time, b for the 5th time (max_epochs is 4), c for the 16th time",
        )
    ]
    again = Loader(mixture(), 8)
    again.restore(loader.state)
    again.draw()
    assert not any(" a " in text for text in again.notes())  # told in the run that is continued


def test_the_state_is_small_and_of_one_mixture():
    loader = Loader(mixture(), 8)
    loader.draw()
    assert len(json.dumps(loader.state)) < 200
    other = Loader(mixture(seed=9), 8)
    with pytest.raises(DataError, match="the data is not what it was"):
        other.restore(loader.state)
    other.restore(loader.state, exact=False)
    assert other.position == 8
    changed = Mixture([MixtureSource("a", numbered(101))], seed=3)
    with pytest.raises(DataError, match="the data is not what it was"):
        Loader(changed, 8).restore(loader.state)


@pytest.mark.parametrize(
    "change",
    [{"position": -1}, {"position": "x"}, {"starts": [1]}, {"starts": []}, {"starts": [0, 5, 3]}, {"starts": None}],
)
def test_a_state_that_cannot_be_is_refused(change):
    loader = Loader(mixture(), 8)
    with pytest.raises(DataError, match="state"):
        loader.restore({**loader.state, **change})
    with pytest.raises(DataError, match="state"):
        loader.restore({})


def test_a_run_of_another_length_begins_its_stages_elsewhere():
    loader = Loader(mixture(total=800), 8)
    drawn(loader, 60)
    with pytest.raises(DataError, match=r"stages began at \(400, 600\).* and at \(1000, 1500\)"):
        Loader(mixture(total=2000), 8).restore(loader.state)
    early = Loader(mixture(total=800), 8)
    drawn(early, 10)
    Loader(mixture(total=2000), 8).restore(early.state)  # nothing has begun yet


def test_batches_name_their_rows():
    loader = Loader(mixture(), 4, rank=1, world=2)
    assert loader.ids() == (4, 5, 6, 7)
    batch = loader.draw()
    assert batch.ids == (4, 5, 6, 7)
    assert batch.seen == 4
    assert loader.where(batch.ids[0]) == f"a (row {batch.tokens[0, 0]})"


def test_errors_of_workers_come_out_of_draw():
    broken = numbered(8)
    object.__setattr__(broken, "read", lambda index: (_ for _ in ()).throw(DataError("x.rows, byte 7: damaged")))
    for workers in (0, 2):
        loader = Loader(broken, 2, workers=workers)
        for _ in range(2):
            with pytest.raises(DataError, match="byte 7"):
                loader.draw()
        assert loader.position == 0


def test_what_cannot_be_loaded_is_refused():
    with pytest.raises(DataError, match="no rows"):
        Loader(pack_stream([], 10), 2, seed=0)
    for bad in ({"batch_rows": 0}, {"rank": 2, "world": 2}, {"workers": -1}):
        with pytest.raises(DataError, match="cannot be"):
            Loader(mixture(), **{"batch_rows": 1, **bad})
    with pytest.raises(DataError, match="different lengths"):
        Mixture([MixtureSource("a", numbered(3)), MixtureSource("b", Rows(*[np.zeros((2, 5), np.int32)] * 3))], seed=0)
    with pytest.raises(DataError, match="b: has a share of the run, but no row of 1 positions"):
        Mixture([MixtureSource("a", numbered(3)), MixtureSource("b", numbered(0))], seed=0)
