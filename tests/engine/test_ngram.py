from __future__ import annotations

import random

import pytest

from herd.engine.ngram import NgramDrafter, NgramIndex
from herd.errors import ConfigError


def plain(tokens: list[int], count: int, shortest: int, longest: int) -> list[int]:
    """The same by looking everywhere."""
    total = len(tokens)
    for length in range(min(longest, total - 1), shortest - 1, -1):
        for end in range(total - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[total - length :]:
                known = list(tokens)
                for i in range(count):
                    known.append(known[end + i])
                return known[total:]
    return []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (2, 4), (3, 3), (1, 6)])
def test_as_looking_everywhere(shortest: int, longest: int) -> None:
    """Random texts of few ids, asked at random moments: the latest place of the longest run, whatever was asked before."""
    draw = random.Random(shortest)
    found = 0
    for _ in range(60):
        index, tokens = NgramIndex(shortest, longest), [draw.randrange(4)]
        for _ in range(60):
            tokens += [draw.randrange(4) for _ in range(draw.randrange(1, 4))]
            expected = plain(tokens, 5, shortest, longest)
            found += bool(expected)
            assert index.continuation(tokens, 5) == expected
    assert found > 100


def test_hashes_that_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hash is the same: runs are compared, so guesses are none instead of wrong."""
    monkeypatch.setattr("herd.engine.ngram.hash", lambda _: 0, raising=False)
    index = NgramIndex(2, 3)
    assert index.continuation([1, 2, 3, 4, 1, 2], 2) == []
    assert NgramIndex(2, 2).continuation([1, 2, 1, 2], 2) == []  # the last run that was noted is (2, 1)


def test_a_period_goes_on() -> None:
    assert NgramIndex(2, 4).continuation([9, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


def test_a_long_text_is_looked_at_once() -> None:
    """Work grows with the new tokens, not with the text."""
    draw = random.Random(0)

    class Counted(list):
        slices = 0

        def __getitem__(self, key):
            self.slices += isinstance(key, slice)
            return super().__getitem__(key)

    tokens = Counted(draw.randrange(50_000) for _ in range(20_000))
    index = NgramIndex(2, 4)
    index.continuation(tokens, 4)
    tokens.slices = 0
    for _ in range(100):
        tokens.append(draw.randrange(50_000))
        index.continuation(tokens, 4)
    assert tokens.slices <= 100 * 9


@pytest.mark.parametrize("bad", [{"count": 0}, {"shortest": 0}, {"shortest": 5}])
def test_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="shortest"):
        NgramDrafter(**bad)
