"""Which row comes when, as a pure function of (key, position): nothing to store, nothing to wind forward. No torch.

Two pieces. `permuted` is a permutation of 0..n-1 that is computed for the positions asked for (a Feistel network with cycle
walking), so that a billion rows need no list. `Shares` deals positions to sources by weight: position p belongs to the source
in whose part of the unit interval frac(start + p * golden ratio) lies. Every stretch of the run then holds each source
in its share within a few rows, rare sources come at even distances, and how often a source was drawn before position p
has a closed form (a sum of floors, as in the Euclidean algorithm).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shares", "key_of", "mixed", "permuted", "permuted_one"]

Wide = NDArray[np.uint64]

ROUNDS = 6
CIRCLE = 1 << 40
"""Points of the circle that `Shares` steps around: shares are exact to one in 10^12."""
STEP = 679_535_556_991
"""CIRCLE / golden ratio, to the nearest odd number: a step that visits every point and never leaves a large gap."""


def key_of(*parts: object) -> int:
    """64 bits that stand for `parts`, the same on every machine and in every Python."""
    return int.from_bytes(sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "little")


def mixed(values: Wide) -> Wide:
    """Every bit of a value into every bit of the result: a well-mixed hash (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permuted(index: Sequence[int] | NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Where the permutation of 0..n-1 that belongs to `key` sends each of `index` [K] -> [K] int64."""
    values = np.asarray(index, dtype=np.uint64)
    if values.size and int(values.max()) >= n:
        raise IndexError(f"index {int(values.max())} of a permutation of {n}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    width, low = np.uint64(half), np.uint64((1 << half) - 1)
    keys = np.array(_round_keys(key), dtype=np.uint64)
    out = values.copy()
    todo = np.arange(values.size)
    while todo.size:  # a network permutes 2^(2 half) values, at most 4 n: steps that leave 0..n-1 are walked on
        left, right = out[todo] >> width, out[todo] & low
        for round_key in keys:
            left, right = right, left ^ (mixed(right ^ round_key) & low)
        out[todo] = (left << width) | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def permuted_one(index: int, n: int, key: int) -> int:
    """`permuted` of a single index, without arrays: ten times as fast."""
    if not 0 <= index < n:
        raise IndexError(f"index {index} of a permutation of {n}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = _round_keys(key)
    value = index
    while True:
        left, right = value >> half, value & low
        for round_key in keys:
            left, right = right, left ^ (_mix_one(right ^ round_key) & low)
        value = (left << half) | right
        if value < n:
            return value


_WORD = (1 << 64) - 1


def _mix_one(value: int) -> int:
    """`mixed` of one value."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


@lru_cache(maxsize=1024)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_mix_one((i * 0x9E3779B97F4A7C15 + key) & _WORD) for i in range(1, ROUNDS + 1))


class Shares:
    """Positions 0, 1, 2, ... dealt to sources by weight. `weights` need not sum to 1; `key` turns the circle."""

    def __init__(self, weights: Sequence[float], key: int) -> None:
        total = float(sum(weights))
        points = [round(CIRCLE * sum(weights[:i]) / total) for i in range(len(weights))]
        self._edges = [*points, CIRCLE]
        self._start = key % CIRCLE

    def source(self, position: int) -> int:
        """Which source the row at `position` comes from."""
        return bisect_right(self._edges, (self._start + position * STEP) % CIRCLE) - 1

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` positions belong to each source."""
        below = [0 if edge == 0 else n if edge == CIRCLE else self._below(n, edge) for edge in self._edges]
        return [after - before for before, after in pairwise(below)]

    def _below(self, n: int, edge: int) -> int:
        """How many of the first `n` points lie before `edge`: the points that a turn of the circle by `edge` moves past 0."""
        turned = self._start - edge + CIRCLE
        return _floor_sum(n, CIRCLE, STEP, self._start) - _floor_sum(n, CIRCLE, STEP, turned) + n


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a i + b) / m) over 0 <= i < n, in O(log m) steps; a and b not negative."""
    total = 0
    while n:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            break
        n, b, m, a = last // m, last % m, a, m
    return total
