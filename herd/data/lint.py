"""What is in training data and what is wrong with it, found in one reading. No torch.

Nothing is written and nothing is left out: every row is read as training would read it, bad rows are named, and what a tokenizer
and a prompt format make of the rest is counted.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from herd.chat.format import ChatFormat
from herd.data.adapt import rows_with_records
from herd.data.duplicates import Duplicate, Duplicates
from herd.data.encode import NO_FORMAT, FormatError, NothingLearned, encode
from herd.data.kinds import Kind
from herd.data.languages import language
from herd.data.leakage import Evaluation, Leak
from herd.data.records import PreferenceRecord, PromptRecord, Record, TextRecord, text_of
from herd.data.report import RowReport
from herd.errors import DataError, PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["NAMED", "Lint", "lint"]

NAMED = 1000
"""Places that a list keeps; what comes after them is counted only."""


@dataclass(slots=True)
class Lint:
    """What a reading found. Lengths are tokens with a tokenizer (`unit` says so), words without."""

    report: RowReport
    unit: str
    kinds: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    learned: int = 0
    """Tokens that carry loss, of all rows."""
    unlearned: list[str] = field(default_factory=list)
    """Rows in which no token carries loss."""
    unlearned_count: int = 0
    too_long: list[tuple[str, int]] = field(default_factory=list)
    too_long_count: int = 0
    duplicates: dict[int, Duplicate] = field(default_factory=dict)
    compared_fully: bool = True
    leaks: list[tuple[str, Leak]] = field(default_factory=list)
    """(row, what it shares with the evaluation row that it shares most with)."""
    leak_count: int = 0
    leaked_rows: set[int] = field(default_factory=set)
    spelled: Counter[str] = field(default_factory=Counter)
    """Marks of prompt formats that stand in texts, and in how many rows each does."""
    spelled_rows: list[str] = field(default_factory=list)
    spelled_count: int = 0
    samples: list[Record] = field(default_factory=list)
    whole: bool = True
    """False when `limit` ended the reading."""

    @property
    def tokens(self) -> int:
        """All lengths together."""
        return sum(self.lengths)

    @property
    def failed(self) -> list[str]:
        """Why this data should not be trained on as it is: empty when nothing stands against it."""
        reasons = []
        if not self.report.good:
            reasons.append("no row can be used")
        if self.report.bad_count:
            reasons.append(f"bad rows: {self.report.bad_count:,}")
        if self.unlearned_count:
            reasons.append(f"rows in which nothing is learned: {self.unlearned_count:,}")
        if self.leak_count:
            reasons.append(f"rows that hold evaluation data: {self.leak_count:,}")
        return reasons


def lint(
    path: Path | str,
    *,
    kind: Kind | None = None,
    tokenizer: Tokenizer | None = None,
    format: ChatFormat | None = None,
    length: int | None = None,
    context: int | None = None,
    against: Evaluation | None = None,
    near: bool = True,
    samples: int = 3,
    limit: int | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Lint:
    """Read the rows of `path` (file, folder or pattern) and say what is in them.

    With `tokenizer` (and `format`, which conversations need) rows are encoded as training does it: a row that the format cannot
    express is a bad row, one without a token to learn is named. `length` is the longest row, in tokens (or words); without it
    `context`, the model's, is that of rows that training does not cut, which are all but texts. `against` are evaluation files.
    `near` looks for near duplicates, too. `limit` good rows are read at most. Raises DataError for files that cannot be read or
    hold rows of several kinds, and for conversations without a format.
    """
    found = Lint(RowReport(), "words" if tokenizer is None else "tokens")
    seen = Duplicates(near=near)
    rows = rows_with_records(path, kind, bad="skip", report=found.report, tick=tick)
    drawn = 0
    for row, record in islice(rows, limit):
        drawn += 1
        try:
            size = _size(record, tokenizer, format, found)
        except NothingLearned:
            found.unlearned_count += 1
            found.unlearned += [record.where][: NAMED - len(found.unlearned)]
            continue
        except FormatError as error:
            raise FormatError(f"{record.where}: {error}") from error
        except (DataError, PromptError) as error:
            found.report.good -= 1
            found.report.reject(row.path, row.line, str(error))
            continue
        text = text_of(record)
        found.kinds[_NAMES[type(record).__name__]] += 1
        found.languages[language(text).code] += 1
        found.lengths.append(size)
        longest = length if length is not None or isinstance(record, TextRecord) else context
        if longest is not None and size > longest:
            found.too_long_count += 1
            found.too_long += [(record.where, size)][: NAMED - len(found.too_long)]
        if marks := set(_MARK.findall(text)):
            found.spelled.update(sorted(marks))
            found.spelled_count += 1
            found.spelled_rows += [record.where][: NAMED - len(found.spelled_rows)]
        seen.add(text, row.path, row.line)
        if against is not None and (leaks := against.leaks(text)):
            found.leak_count += 1
            found.leaked_rows.update(number for number, _ in leaks)
            found.leaks += [(record.where, leaks[0][1])][: NAMED - len(found.leaks)]
        if len(found.samples) < samples:
            found.samples.append(record)
    found.whole = limit is None or drawn < limit
    found.duplicates = seen.find()
    found.compared_fully = not seen.passed_over
    return found


_MARK = re.compile(r"<\|[a-z][a-z0-9_]*\|>|\[/?INST\]|<</?SYS>>")
"""How Llama's formats and ChatML write their special tokens. In a text they are letters, and never become the tokens."""

_NAMES = {
    "TextRecord": "text",
    "ChatRecord": "chat",
    "CompletionRecord": "completion",
    "PreferenceRecord": "preference",
    "PromptRecord": "prompt",
}


def _size(record: Record, tokenizer: Tokenizer | None, format: ChatFormat | None, found: Lint) -> int:
    """The length of a record; what is learned of it is added to `found`."""
    if tokenizer is None:
        return len(text_of(record).split())
    if isinstance(record, PreferenceRecord | PromptRecord):
        return _longest(record, tokenizer, format)
    example = encode(record, tokenizer, format)
    found.learned += example.learned
    return len(example)


def _longest(record: PreferenceRecord | PromptRecord, tokenizer: Tokenizer, format: ChatFormat | None) -> int:
    """Tokens of the prompt with the longer reply: what methods that compare replies hold in memory."""
    replies = (record.chosen, record.rejected) if isinstance(record, PreferenceRecord) else ("",)
    sizes = []
    for reply in replies:
        if isinstance(record.prompt, str):
            sizes.append(
                len(tokenizer.encode(record.prompt)) + (len(tokenizer.encode(reply)) if isinstance(reply, str) else 0)
            )
            continue
        if format is None:
            raise FormatError(NO_FORMAT)
        messages = record.prompt if isinstance(reply, str) else (*record.prompt, *reply)
        sizes.append(len(format.render(messages, record.tools, generate=isinstance(reply, str)).tokens))
    return max(sizes)
