"""Texts that say what an earlier text said: exactly, or nearly (MinHash with locality-sensitive hashing). No torch.

Two texts are near duplicates when their sets of five-word runs have a Jaccard similarity of at least `threshold`. Each set is
summed up by HASHES minima (Broder 1997): the share of equal minima estimates the similarity, with a standard error of
sqrt(s (1 - s) / 120), 0.037 at 0.8. Candidates are texts that agree in a whole band of ROWS minima: a pair of similarity 0.8 is
one with probability 0.998, of 0.7 with 0.92, of 0.5 with 0.27 (and is then told apart by its estimate).

The first of several wins, in the order in which texts are added; a text is held against those that stay only, so that a chain of
small changes is not eaten up as a whole. The result depends on the texts and their order alone.

Memory: 480 bytes for the minima of each text that is no exact duplicate, and about 150 for its place; while `find` runs, 24 more.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from herd.data.order import mixed
from herd.data.words import Hashes, grams, word_hashes, words

__all__ = ["BANDS", "HASHES", "ROWS", "THRESHOLD", "Duplicate", "Duplicates", "jaccard", "shingles", "signature"]

THRESHOLD = 0.8
"""Similarity of near duplicates when nobody says another."""
SHINGLE = 5
"""Words in a run."""

BANDS, ROWS = 20, 6
HASHES = BANDS * ROWS

COMPARED = 4096
"""Earlier texts of one band that a text is held against at most; more are said (`Duplicates.passed_over`)."""

_CHUNK = 512  # runs hashed at once: 512 x 120 x 4 bytes stay in a processor's cache
_rng = np.random.default_rng(20210713)
# Hash functions x -> a x + b modulo 2^32 (a odd: one to one) of numbers that are well mixed already.
_FACTORS = (_rng.integers(0, 1 << 31, (HASHES, 1), dtype=np.uint32) << np.uint32(1)) | np.uint32(1)
_OFFSETS = _rng.integers(0, 1 << 32, (HASHES, 1), dtype=np.uint32)


def shingles(text: str) -> Hashes:
    """[n] uint64: the runs of SHINGLE words, repeated ones repeated; a shorter text is one run as a whole."""
    found = word_hashes(words(text))
    return grams(found, min(SHINGLE, max(len(found), 1)))


def jaccard(a: str, b: str) -> float:
    """The similarity itself: shared runs by all runs. What `signature` estimates."""
    one, other = set(shingles(a).tolist()), set(shingles(b).tolist())
    return len(one & other) / len(one | other) if one or other else 1.0


def signature(text: str) -> NDArray[np.uint32]:
    """[HASHES] uint32: the minima of a text's runs under HASHES hash functions."""
    runs = shingles(text).astype(np.uint32)
    least = np.full(HASHES, np.iinfo(np.uint32).max, np.uint32)
    for at in range(0, len(runs), _CHUNK):
        hashed = _FACTORS * runs[at : at + _CHUNK]
        hashed += _OFFSETS
        np.minimum(least, hashed.min(1), out=least)
    return least


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A text that says what an earlier one said. `similarity` is 1 for exact ones, else the estimate."""

    where: str
    of: str
    exact: bool
    similarity: float


class Duplicates:
    """Texts are added one by one, then `find` says which of them are duplicates.

    Exact: equal after Unicode normalisation (NFC) with white space of any kind taken as one space. `near` False leaves near
    duplicates alone.
    """

    def __init__(self, threshold: float = THRESHOLD, *, near: bool = True) -> None:
        self.threshold, self.near = threshold, near
        self.passed_over = 0
        """Comparisons that `find` left out because of COMPARED."""
        self._paths: dict[str, int] = {}
        self._places: list[tuple[int, int]] = []
        self._exact: dict[bytes, int] = {}
        self._first: dict[int, int] = {}  # exact duplicates: index -> the earlier text
        self._unique: list[int] = []
        self._signatures = np.empty((1024, HASHES), np.uint32)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, text: str, path: str, line: int) -> bool:
        """Take in a text and its place; whether it is an exact duplicate of an earlier one."""
        index = len(self._places)
        self._places.append((self._paths.setdefault(path, len(self._paths)), line))
        folded = " ".join(unicodedata.normalize("NFC", text).split())
        first = self._exact.setdefault(blake2b(folded.encode("utf-8", "replace"), digest_size=16).digest(), index)
        if first != index:
            self._first[index] = first
            return True
        if self.near:
            if len(self._unique) == len(self._signatures):
                self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
            self._signatures[len(self._unique)] = signature(text)
            self._unique.append(index)
        return False

    def find(self, tick: Callable[[int, int], None] = lambda done, total: None) -> dict[int, Duplicate]:
        """The duplicates by the number of their text (from 0, in the order of `add`). `tick` is told bands done of all."""
        paths = list(self._paths)

        def where(index: int) -> str:
            path, line = self._places[index]
            return f"{paths[path]}:{line}"

        found = {index: Duplicate(where(index), where(of), True, 1.0) for index, of in self._first.items()}
        for row, of, similarity in self._near(tick) if self.near else ():
            index = self._unique[row]
            found[index] = Duplicate(where(index), where(self._unique[of]), False, similarity)
        return dict(sorted(found.items()))

    def _near(self, tick: Callable[[int, int], None]) -> list[tuple[int, int, float]]:
        """(row, earlier row, similarity) of the signatures."""
        minima = self._signatures[: len(self._unique)]
        groups: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # row -> (band, its bucket)
        for band in range(BANDS):
            keys = _key(minima[:, band * ROWS : (band + 1) * ROWS])
            order = np.argsort(keys, kind="stable")
            same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
            for row in np.unique(np.concatenate([order[same], order[same + 1]])).tolist():
                groups[row].append((band, int(keys[row])))
            tick(band + 1, BANDS + 1)
        kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        found: list[tuple[int, int, float]] = []
        for row in sorted(groups):
            candidates: set[int] = set()
            for bucket in groups[row]:
                candidates.update(kept[bucket][:COMPARED])
                self.passed_over += max(len(kept[bucket]) - COMPARED, 0)
            if candidates:
                earlier = np.array(sorted(candidates))
                shares = (minima[earlier] == minima[row]).mean(1)
                best = int(shares.argmax())
                if shares[best] >= self.threshold:
                    found.append((row, int(earlier[best]), float(shares[best])))
                    continue
            for bucket in groups[row]:
                kept[bucket].append(row)
        tick(BANDS + 1, BANDS + 1)
        return found


def _key(minima: NDArray[np.uint32]) -> Hashes:
    """[N] uint64: one number for each row of a band."""
    key = np.zeros(len(minima), np.uint64)
    for column in minima.T:
        key = mixed(key * np.uint64(31) + column.astype(np.uint64))
    return key
