"""Training texts that hold what an evaluation asks: runs of words that stand in both. No torch.

A text of an evaluation row (any string in it) with at least RUN words leaks where one of its runs of RUN words stands in a
training text (13 words, as in GPT-3's decontamination). One with SHORT to RUN - 1 words leaks where all of it does. Shorter ones
are too common to say anything: they are not looked for, and rows that hold nothing longer are counted as unchecked. Words are
those of `herd.data.words`: case, punctuation and spacing are no difference. Paraphrases and translations are not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from herd.data.read import RowReport, open_rows
from herd.data.words import grams, word_hashes, words

__all__ = ["RUN", "SHORT", "Evaluation", "Leak"]

RUN, SHORT = 13, 8
"""Words of a run that counts, and of the shortest text that is looked for as a whole."""


@dataclass(frozen=True, slots=True)
class Leak:
    """What a training text shares with an evaluation row: its `file:line`, the first shared words, and how many runs."""

    where: str
    words: str
    runs: int


class Evaluation:
    """The runs of words of evaluation files, to hold training texts against. Memory: some 30 bytes for each word of them."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        """Read every row of `paths` (files, folders or patterns). Raises DataError for files; bad rows are in `report`."""
        self.report = RowReport()
        self.rows: list[tuple[str, int]] = []
        self.unchecked = 0
        """Rows that hold no text of SHORT words."""
        owners: list[int] = []
        hashes: list[np.ndarray] = []
        self.lengths: set[int] = set()
        for path in paths:
            for row in open_rows(path, self.report, bad="skip"):
                long_enough = False
                for text in _strings(row.fields):
                    found = word_hashes(words(text))
                    if len(found) < SHORT:
                        continue
                    long_enough = True
                    length = min(len(found), RUN)
                    self.lengths.add(length)
                    runs = np.unique(grams(found, length))
                    hashes.append(runs)
                    owners += [len(self.rows)] * len(runs)
                self.rows.append((row.path, row.line))
                self.unchecked += not long_enough
        joined = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        order = np.argsort(joined, kind="stable")
        self._hashes, self._owners = joined[order], np.array(owners, np.int64)[order]
        # Most runs of a text are in no evaluation: one look into a table says so for nine of ten.
        self._bits = np.uint64(max(20, (8 * len(joined)).bit_length()))
        self._there = np.zeros(1 << int(self._bits), bool)
        self._there[joined >> (np.uint64(64) - self._bits)] = True

    def __len__(self) -> int:
        return len(self.rows)

    def leaks(self, text: str) -> list[tuple[int, Leak]]:
        """(number of the evaluation row, what is shared) for every row that `text` shares a run with, most runs first."""
        found = words(text)
        hashes = word_hashes(found)
        shared: dict[int, tuple[str, int]] = {}
        for length in sorted(self.lengths, reverse=True):
            runs = grams(hashes, length)
            maybe = np.flatnonzero(self._there[runs >> (np.uint64(64) - self._bits)])
            begin = np.searchsorted(self._hashes, runs[maybe])
            hit = self._hashes[np.minimum(begin, len(self._hashes) - 1)] == runs[maybe]
            for position, first in zip(maybe[hit].tolist(), begin[hit].tolist(), strict=True):
                end = int(np.searchsorted(self._hashes, runs[position], "right"))
                for owner in dict.fromkeys(self._owners[first:end].tolist()):
                    said, count = shared.get(owner, (" ".join(found[position : position + length]), 0))
                    shared[owner] = said, count + 1
        order = sorted(shared, key=lambda owner: (-shared[owner][1], owner))
        return [(o, Leak(f"{self.rows[o][0]}:{self.rows[o][1]}", *shared[o])) for o in order]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
