import itertools
from collections import Counter

import numpy as np
import pytest

from herd.data.order import Shares, key_of, permuted, permuted_one

CHI = 45.0
"""Chi-squared of 24 orders (23 degrees of freedom): chance passes it once in 250 keys."""


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097])
def test_a_permutation_has_every_member_once(n):
    assert sorted(permuted(np.arange(n), n, key_of("a", n)).tolist()) == list(range(n))


def test_any_part_can_be_asked_for_alone():
    whole = permuted(np.arange(500), 500, 7)
    assert permuted([499, 3, 3], 500, 7).tolist() == [whole[499], whole[3], whole[3]]
    assert [permuted_one(i, 500, 7) for i in range(500)] == whole.tolist()
    for call in (lambda: permuted([500], 500, 7), lambda: permuted_one(500, 500, 7)):
        with pytest.raises(IndexError):
            call()


def test_huge_permutations_cost_nothing():
    found = permuted([0, 1, 10**12 - 1], 10**12, 3)
    assert len(set(found.tolist())) == 3
    assert (found < 10**12).all()


def test_orders_of_few_are_equally_likely():
    tries = 4800
    seen = Counter(tuple(permuted_one(j, 4, key_of("chi", i)) for j in range(4)) for i in range(tries))
    expected = tries / 24
    assert sum((seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(4))) < CHI


def test_neighbours_are_torn_apart():
    order = permuted(np.arange(10_000), 10_000, 1)
    steps = np.abs(np.diff(order))
    assert abs(steps.mean() / (10_000 / 3) - 1) < 0.05  # the mean distance of two random members is n / 3
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_keys_do_not_depend_on_the_process():
    assert key_of("seed", 1, "x") == 7213150057395898975
    assert key_of("a", "b") != key_of("ab")


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [5, 3, 2], [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02], [0, 1, 0, 2, 0]]
)
def test_counts_are_what_was_dealt(weights):
    shares = Shares(weights, key_of("w"))
    dealt = [0] * len(weights)
    for position in range(700):
        if position % 61 == 0:
            assert shares.counts(position) == dealt
        dealt[shares.source(position)] += 1
    assert shares.counts(700) == dealt
    assert [bool(w) for w in weights] == [bool(d) for d in dealt]


def test_every_stretch_has_its_share():
    weights = [0.6, 0.3, 0.09, 0.01]
    shares = Shares(weights, 12345)
    dealt = np.array([shares.source(p) for p in range(20_000)])
    for source, weight in enumerate(weights):
        window = np.convolve(dealt == source, np.ones(1000), mode="valid")
        assert np.abs(window - 1000 * weight).max() < 6  # a coin would be off by 50
    gaps = np.diff(np.flatnonzero(dealt == 3))
    assert gaps.min() > 30
    assert gaps.max() < 260


def test_counts_far_away_are_exact():
    shares = Shares([1, 2, 3], 99)
    n = 10**15
    assert sum(shares.counts(n)) == n
    assert shares.counts(n + 1)[shares.source(n)] == shares.counts(n)[shares.source(n)] + 1
