"""From a row of logits to the next id: temperature, top-k, typical-p, top-p (Meta's rule), min-p, then one draw.

Nothing here sorts a vocabulary. Where a filter needs tokens in order, their ranks are gathered in buckets by the upper bits of a
float32, whose order is that of the numbers; only the bucket in which the filter's border falls is sorted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from herd.chat.params import SamplingParams

__all__ = ["COLDEST", "HOTTEST", "Weights", "best_of_row", "draw", "weigh"]

COLDEST = 1e-30
"""Lower temperatures are taken as this one: dividing by a number that underflows would turn the best token into a NaN."""
HOTTEST = 1e30
"""Higher temperatures are taken as this one, for float32's sake; all tokens are equally likely long before."""
BLOCK = 64
"""Tokens per block: block sums lead to the token that is drawn, block maxima to the k largest."""
BUCKET_BITS = 16
FEW = 1024
"""So many ranks are sorted without buckets."""
ONE = int(np.float32(1).view(np.int32))

Row = NDArray[np.float32]


class Scratch(threading.local):
    """Buffers of this thread that are used again: to get and give back fresh pages takes longer than the work done in them."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[Any]] = {}

    def take(self, name: str, size: int, dtype: DTypeLike) -> NDArray[Any]:
        """An array [size] with anything in it, the one that this name had before if it was large enough."""
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = np.empty(size, dtype=dtype)
        return held[:size]


_scratch = Scratch()


@dataclass(frozen=True, slots=True)
class Weights:
    """A distribution: `values` [n] float32, not normalised, of the rising `ids` [n]; or of all ids when `ids` is None.

    What `weigh` returns lives in a buffer of its thread, until the next call there; `copy` keeps it.
    """

    ids: NDArray[np.int64] | None
    values: Row

    def dense(self, size: int) -> NDArray[np.float64]:
        """Probabilities [size] in float64; ids past the values have none."""
        full = np.zeros(size)
        full[slice(len(self.values)) if self.ids is None else self.ids] = self.values
        return full / full.sum()

    def only(self, kept: NDArray[np.bool_]) -> Weights:
        """Those marked in `kept` [n]; this distribution is not to be used any more."""
        if self.ids is None:
            return Weights(None, np.multiply(self.values, kept, out=self.values))
        return Weights(self.ids[kept], self.values[kept])

    def copy(self) -> Weights:
        """The same, in memory of its own."""
        return Weights(None if self.ids is None else self.ids.copy(), self.values.copy())


def weigh(row: Row, params: SamplingParams) -> Weights:
    """What may follow and how likely: logits [V] (at least one finite, none NaN or +inf) through all filters of `params`.

    Needs temperature > 0. Ties at the border of top-k and typical-p all stay; at top-p's only the first ids that make up p.
    """
    values = np.subtract(row, row.max(), out=_scratch.take("values", len(row), np.float32))
    if params.temperature != 1:
        with np.errstate(over="ignore"):  # a logit far below the best one becomes -inf, which is right
            values /= np.float32(min(max(params.temperature, COLDEST), HOTTEST))
    np.exp(values, out=values)
    weights = _largest(values, params.top_k) if 0 < params.top_k < len(values) else Weights(None, values)
    if params.typical_p < 1:
        weights = _typical(weights, params.typical_p)
    if params.top_p < 1:
        weights = _nucleus(weights, params.top_p)
    if params.min_p:
        weights = weights.only(weights.values >= np.float32(params.min_p) * weights.values.max())
    return weights


def draw(weights: Weights, uniform: float) -> int:
    """The id at `uniform` (from 0 up to, not including, 1) of the cumulative distribution, in the order of the ids."""
    values = weights.values
    whole = len(values) // BLOCK * BLOCK
    wide = _scratch.take("wide", whole, np.float64)
    np.copyto(wide, values[:whole])
    sums = wide.reshape(-1, BLOCK).sum(axis=1)
    mass = np.append(sums, values[whole:].sum(dtype=np.float64)).cumsum()
    block, before = _find(mass, uniform * mass[-1])
    inside = values[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    at = block * BLOCK + _find(inside, uniform * mass[-1] - before)[0]
    return at if weights.ids is None else int(weights.ids[at])


def _find(mass: NDArray[np.float64], at: float) -> tuple[int, float]:
    """The first index whose cumulative `mass` is above `at`, and the mass before it; never one without mass of its own."""
    at = min(at, float(np.nextafter(mass[-1], 0)))  # rounding may have brought it up to all there is
    index = int(mass.searchsorted(at, side="right"))
    return index, float(mass[index - 1]) if index else 0.0


def best_of_row(row: Row, count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest of `row` [V], largest first, ties by id."""
    count = min(count, row.shape[0])
    ids = np.flatnonzero(row >= _bound(row, count))
    return ids[np.lexsort((ids, -row[ids]))[:count]]


def _bound(row: Row, k: int) -> float:
    """A number that at least k entries of `row` [V] reach: the k-th largest itself or one a little below it."""
    blocks = row.shape[0] // BLOCK
    if k > blocks // 2:
        return float(np.partition(row, row.shape[0] - k)[row.shape[0] - k])
    tops = row[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
    return float(np.partition(tops, blocks - k)[blocks - k])


def _largest(values: Row, k: int) -> Weights:
    """The k largest weights, and those equal to the last of them."""
    ids = np.flatnonzero(values >= _bound(values, k))
    weights = Weights(ids, values[ids])
    return weights.only(weights.values >= np.partition(weights.values, len(ids) - k)[len(ids) - k])


def _typical(weights: Weights, typical_p: float) -> Weights:
    """Those whose surprise is nearest to the entropy and that together reach `typical_p` (arXiv 2202.00666)."""
    chances = (weights.values / weights.values.sum(dtype=np.float64)).astype(np.float32)
    surprise = -np.log(chances, where=chances > 0, out=np.full_like(chances, -np.inf))
    entropy = (chances * np.where(chances > 0, surprise, 0)).sum(dtype=np.float64)
    ranks = np.abs(surprise - np.float32(entropy)).view(np.int32)
    last, _ = _border(ranks, chances, float(np.nextafter(typical_p, 0)))
    return weights.only(ranks <= last)


def _nucleus(weights: Weights, top_p: float) -> Weights:
    """The likeliest ones until the mass before them exceeds `top_p` of all, so that at least one stays.

    The rule is that of llama-models models/llama3/generation.py.
    """
    ranks = _scratch.take("ranks", len(weights.values), np.int32)
    np.subtract(ONE, weights.values.view(np.int32), out=ranks)
    last, surplus = _border(ranks, weights.values, top_p, share=True)
    stays = ranks <= last
    stays[surplus] = False
    return weights.only(stays)


def _border(
    ranks: NDArray[np.int32], masses: Row, limit: float, *, share: bool = False
) -> tuple[int, NDArray[np.int64]]:
    """Where tokens, taken by rising rank (from 0) and then by id, have passed `limit` of mass (of all mass with `share`).

    A token stays when the mass before it is at most the limit. Gives the rank of the last one that stays, and the indices of
    those of that rank that do not.
    """
    shift = BUCKET_BITS if len(ranks) > FEW else 31
    buckets = np.right_shift(ranks, shift, out=_scratch.take("buckets", len(ranks), np.intp))
    wide = _scratch.take("wide", len(masses), np.float64)
    np.copyto(wide, masses)
    mass = np.bincount(buckets, weights=wide).cumsum()
    if share:
        limit *= float(mass[-1])
    bucket = min(int(mass.searchsorted(limit, side="right")), int(buckets.max()))
    inside = np.flatnonzero(buckets == bucket)
    inside = inside[ranks[inside].argsort(kind="stable")]
    before = (float(mass[bucket - 1]) if bucket else 0.0) + masses[inside[:-1]].cumsum(dtype=np.float64)
    kept = 1 + int((before <= limit).sum())
    last = int(ranks[inside[kept - 1]]) if kept else -1
    return last, inside[kept:][ranks[inside[kept:]] == last]
