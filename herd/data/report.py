"""What reading data did: rows given out, rows left out and why, and everything else that a person should be told. No torch."""

from __future__ import annotations

import re
from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from herd.errors import DataError

__all__ = ["BadRow", "BadRows", "RowReport", "counted"]

BadRows = Literal["stop", "skip"]
"""What a bad row does: end the reading with a DataError, or be left out and counted."""

KEPT = 10_000
"""Bad rows that a report keeps one by one; those after them are counted by reason. A file of nothing but bad rows must not
fill the memory."""

_DETAIL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[\d,]*\d")


def counted(count: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that was left out: the file, its line (from 1) and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(slots=True)
class RowReport:
    """What reading did: rows given out, every row left out, what was changed on the way, and notes.

    `bad` holds the first KEPT rows that were left out, those of one file by line, `bad_count` how many there were, `reasons`
    how many for each reason (numbers and quoted words replaced by dots). `changed` counts small repairs by what they did.
    """

    good: int = 0
    bad: list[BadRow] = field(default_factory=list)
    bad_count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    _file: int = field(default=0, repr=False, compare=False)
    """Where the rows of the file that is being read begin in `bad`."""

    def reject(self, path: Path | str, line: int, reason: str) -> None:
        """Record one row that was left out."""
        self.bad_count += 1
        self.reasons[_DETAIL.sub("...", reason)] += 1
        if len(self.bad) < KEPT:
            if not self.bad or self.bad[-1].path != str(path):
                self._file = len(self.bad)
            insort(self.bad, BadRow(str(path), line, reason), lo=self._file, key=lambda row: row.line)

    def change(self, what: str) -> None:
        """Count one small repair of a row that was given out."""
        self.changed[what] += 1

    def note(self, text: str) -> None:
        """Something to be said once."""
        if text not in self.notes:
            self.notes.append(text)

    def check(self, allowed: int = 0) -> None:
        """Raise DataError naming the first bad rows when more than `allowed` were left out."""
        if self.bad_count > allowed:
            shown = "\n  ".join(str(row) for row in self.bad[:5])
            raise DataError(f"{self.bad_count} bad rows (allowed {allowed}, good {self.good}):\n  {shown}")

    def add(self, other: RowReport) -> None:
        """Take in what another part of the same reading did (of another process, for example)."""
        self.good += other.good
        self.bad += other.bad[: max(KEPT - len(self.bad), 0)]
        self._file = len(self.bad)
        self.bad_count += other.bad_count
        self.reasons.update(other.reasons)
        self.changed.update(other.changed)
        for text in other.notes:
            self.note(text)
