"""The promise about time, on a made clock: steps cost what the test says, guesses are right as often as it says."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from herd.chat.params import SamplingParams
from herd.engine.pace import Pace
from herd.engine.request import Request, Sequence

Seconds = Callable[[int, int], float]


def sequences(count: int) -> list[Sequence]:
    return [Sequence(Request(str(i), (1,), SamplingParams()), 0, (i, 0)) for i in range(count)]


def run(
    pace: Pace, count: int, tokens: int, right: list[float], seconds: Seconds, noise: float = 0.0, seed: int = 0
) -> float:
    """Time for `count` * `tokens` tokens of sequences that do not end, over the time that plain steps would have taken."""
    draw = random.Random(seed)
    batch = sequences(count)
    made, spent = 0, 0.0
    while made < count * tokens:
        drafted = got = 0
        pace.begin()
        for sequence, rate in zip(batch, right, strict=True):
            n, hits = pace.count(sequence, count), 0
            while hits < n and draw.random() < rate:
                hits += 1
            if n:
                pace.learn(sequence, n, hits)
            drafted += n
            got += 1 + hits
        cost = seconds(count, drafted) * (1 + noise * abs(draw.gauss(0, 1)))
        pace.settle(count, drafted, got, cost)
        spent += cost
        made += got
    return spent / (made / count * seconds(count, 0) * (1 + noise * 0.8))  # 0.8: the mean of |gauss|


MACHINES: dict[str, Seconds] = {
    "rows are free": lambda n, drafted: 1.0 + 0.01 * (n + drafted),
    "rows cost a tenth": lambda n, drafted: 1.0 + 0.1 * (n + drafted),
    "rows cost a step": lambda n, drafted: float(n + drafted),
    "a guess costs a step": lambda n, drafted: 1.0 + 1.05 * drafted,
    "guessing alone costs a step": lambda n, drafted: 1.0 + (drafted > 0),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("right", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("count", [1, 8])
def test_never_slower_than_promised(machine: str, right: float, count: int) -> None:
    """Useless and nearly useless guesses, cheap and dear rows: at least 0.97 of the speed without."""
    for seed in range(5):
        assert run(Pace(), count, 300, [right] * count, MACHINES[machine], seed=seed) <= 1 / 0.97


def test_good_guesses_that_cost_too_much() -> None:
    """A draft model as large as the model: nearly all right, and still slower."""
    for count in (1, 8):
        assert run(Pace(), count, 300, [0.97] * count, MACHINES["a guess costs a step"]) <= 1 / 0.97


def test_good_guesses_pay() -> None:
    free = MACHINES["rows are free"]
    assert run(Pace(), 1, 400, [0.9], free) < 0.3
    assert run(Pace(), 1, 400, [0.6], free) < 0.6
    assert run(Pace(), 8, 400, [0.9] * 8, free) < 0.5


def test_noise_does_not_switch_good_guesses_off() -> None:
    assert run(Pace(), 1, 400, [0.8], MACHINES["rows cost a tenth"], noise=0.2) < 0.75


def test_a_good_sequence_guesses_beside_bad_ones() -> None:
    pace = Pace()
    batch = sequences(4)
    for _ in range(2):
        pace.settle(4, 0, 4, 1.0)
    for _ in range(60):
        pace.begin()
        drafted = right = 0
        for i, sequence in enumerate(batch):
            if n := pace.count(sequence, 4):
                pace.learn(sequence, n, n if i == 0 else 0)
                drafted, right = drafted + n, right + n * (i == 0)
        pace.settle(4, drafted, 4 + right, 1.0)
    pace.begin()
    counts = [pace.count(sequence, 4) for sequence in batch]
    assert counts[0] == 8
    assert sum(counts[1:]) <= 1


def test_nothing_is_guessed_before_a_plain_step_was_measured() -> None:
    pace, (sequence,) = Pace(), sequences(1)
    assert pace.count(sequence, 1) == 0
    pace.settle(1, 0, 1, 1.0)
    pace.settle(1, 0, 1, 1.0)
    pace.begin()
    assert pace.count(sequence, 2) == 0  # that many were never measured
    assert pace.count(sequence, 1) == 1  # a careful beginning
    assert pace.count(sequence, 1) == 0  # for all sequences together
    assert Pace(5, always=True).count(sequence, 2) == 5


def test_plain_steps_are_measured_again() -> None:
    pace, (sequence,) = Pace(), sequences(1)
    for _ in range(2):
        pace.settle(1, 0, 1, 1.0)
    guessed = 0
    for _ in range(400):
        pace.begin()
        n = pace.count(sequence, 1)
        if n:
            pace.learn(sequence, n, n)
        guessed += n > 0
        pace.settle(1, n, 1 + n, 1.0)
    assert 390 <= guessed < 400
