"""Texts that a vocabulary is trained on: everything that `herd.data` reads, or a sample of it that fits a bound. No torch.

Every document is read. When they are more than `budget` bytes together, a sample stays: each part of a document draws a number
from its place in the reading, and the parts with the lowest numbers stay, in their order. So the sample is spread over all
files, and the same files in the same order give the same sample, whatever the machine.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from herd.data.adapt import Kind, rows_with_records
from herd.data.files import find_files
from herd.data.records import text_of
from herd.data.report import BadRows, RowReport
from herd.errors import DataError

__all__ = ["PART", "Sample", "parts", "read_texts", "sample"]

PART = 1 << 18
"""Bytes of the longest part that is drawn as one: longer documents are cut at a line end, so that no book is all or nothing."""

Tick = Callable[[int, int], None]


def _still(done: int, total: int) -> None:
    """Told of progress, does nothing."""


@dataclass(slots=True)
class Sample:
    """`texts` (UTF-8) of `documents` documents and `size` bytes that were read; `report` is what reading had to say."""

    texts: list[bytes] = field(default_factory=list)
    documents: int = 0
    size: int = 0
    report: RowReport = field(default_factory=RowReport)

    @property
    def kept(self) -> int:
        """Bytes of the texts."""
        return sum(map(len, self.texts))

    @property
    def whole(self) -> bool:
        """Whether everything that was read is here."""
        return self.kept == self.size


def read_texts(
    paths: Sequence[str], *, kind: Kind | None = None, bad: BadRows = "stop", report: RowReport, tick: Tick = _still
) -> Iterator[tuple[str, str]]:
    """(file, text) of every record of every path, in order. Raises DataError for bad rows, or enters them in `report`.

    A file that two paths mean is refused: its words would count twice.
    """
    seen: set[Path] = set()
    sizes = []
    for path in paths:
        files = {file.resolve() for file in find_files(path)}
        if twice := sorted(files & seen):
            raise DataError(f"{twice[0]}: is named twice")
        seen |= files
        sizes.append(sum(file.stat().st_size for file in files))
    total, before = sum(sizes), 0
    for path, size in zip(paths, sizes, strict=True):
        told = lambda done, _, before=before: tick(before + done, total)  # noqa: E731
        for row, record in rows_with_records(path, kind, bad=bad, report=report, tick=told):
            yield row.path, text_of(record)
        before += size


def sample(
    paths: Sequence[str],
    budget: int,
    *,
    kind: Kind | None = None,
    bad: BadRows = "stop",
    tick: Tick = _still,
) -> Sample:
    """The texts of `paths`, or a sample of at most `budget` bytes. Raises DataError for bad rows (`bad`) and for no text."""
    made = Sample()
    # Minus the number drawn, place, text: the highest number is the first to go.
    kept: list[tuple[int, int, bytes]] = []
    held = place = 0
    for _, text in read_texts(paths, kind=kind, bad=bad, report=made.report, tick=tick):
        made.documents += 1
        for part in parts(text.encode("utf-8")):
            made.size += len(part)
            heapq.heappush(kept, (-_drawn(place), place, part))
            held, place = held + len(part), place + 1
            while held > budget and len(kept) > 1:
                held -= len(heapq.heappop(kept)[2])
    made.texts = [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]
    if not any(text.strip() for text in made.texts):
        raise DataError(f"there is no text in {', '.join(paths)}")
    return made


def _drawn(place: int) -> int:
    """A number that looks drawn by chance and depends on nothing but `place`."""
    return int.from_bytes(hashlib.blake2b(place.to_bytes(8, "little"), digest_size=8).digest(), "little")


def parts(text: bytes) -> Iterator[bytes]:
    """`text` in parts of at most PART bytes, cut after a line end where there is one, never inside a character."""
    at = 0
    while len(text) - at > PART:
        end = text.rfind(b"\n", at, at + PART) + 1
        if end <= at:
            end = at + PART
            while text[end] & 0xC0 == 0x80:
                end -= 1
        yield text[at:end]
        at = end
    if at < len(text):
        yield text[at:]
