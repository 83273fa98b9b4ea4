"""Tokenized documents on disk: ids, borders, what of them is learned, and the lines they were made of. No torch.

One source file becomes one folder of shards, named after the content that can change them; see `herd.data.build`. A shard
(`herd.data.sections`) holds the arrays

    tokens   the ids of its documents, back to back (u2 where the vocabulary allows, else u4)
    ends     where each document ends in `tokens` (i8)
    lines    the line of the source file that it was made of (u4)
    marks    64 bits of a hash of its ids (u8): equal documents have equal marks
    learned  one bit per token: whether the token after it is learned (not there for text, where all are)

and says about itself which rows of which content it holds, and the fingerprints of tokenizer and prompt format.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herd.data.sections import Sections, write_sections
from herd.errors import DataError

__all__ = ["Documents", "Shard", "Tokenized", "write_shard"]

Longs = NDArray[np.int64]


class Tokenized:
    """Documents that became tokens and are not on disk yet: arrays as a shard has them, `learned` one byte per token."""

    def __init__(
        self, tokens: NDArray[Any], sizes: Longs, lines: NDArray[np.uint32], learned: NDArray[np.uint8] | None
    ) -> None:
        self.tokens, self.sizes, self.lines, self.learned = tokens, sizes, lines, learned

    @staticmethod
    def joined(parts: Sequence[Tokenized], dtype: np.dtype[Any], masked: bool) -> Tokenized:
        """All `parts`, in order."""
        return Tokenized(
            np.concatenate([np.zeros(0, dtype), *(part.tokens for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part.sizes for part in parts)]),
            np.concatenate([np.zeros(0, np.uint32), *(part.lines for part in parts)]),
            np.concatenate([np.zeros(0, np.uint8), *(part.learned for part in parts if part.learned is not None)])
            if masked
            else None,
        )


def write_shard(path: Path, about: dict[str, Any], documents: Tokenized) -> None:
    """Write one shard, whole or not at all. The same documents give the same bytes."""
    ends = np.cumsum(documents.sizes, dtype=np.int64)
    marks = np.zeros(len(ends), np.uint64)
    start = 0
    for i, end in enumerate(ends.tolist()):
        marks[i] = int.from_bytes(blake2b(documents.tokens[start:end].data, digest_size=8).digest(), "little")
        start = end
    arrays: dict[str, NDArray[Any]] = {
        "tokens": documents.tokens,
        "ends": ends,
        "lines": documents.lines,
        "marks": marks,
    }
    learned = int(len(documents.tokens) - len(ends))
    if documents.learned is not None:
        arrays["learned"] = np.packbits(documents.learned, bitorder="little")
        learned = int(documents.learned.sum())
    write_sections(path, {**about, "learned": learned}, arrays)


class Shard:
    """One shard, mapped. `source` is the path of the file it was made of, for messages.

    Raises DataError when the file is damaged, or its arrays do not belong together.
    """

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.file = Sections(path)
        counts, about = self.file.counts, self.file.about
        if missing := {"tokens", "ends", "lines", "marks"} - counts.keys():
            raise DataError(f"{path}: is no shard of documents: {sorted(missing)[0]} is missing")
        self.masked = "learned" in counts
        try:
            self.vocab_size, self.kind = int(about["vocab_size"]), str(about["kind"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: the header does not say what it was made with; build it again") from error
        self.tokens, self.documents = counts["tokens"], counts["ends"]
        same = {counts["lines"], counts["marks"], self.documents}
        if len(same) > 1 or (self.masked and counts["learned"] != -(-self.tokens // 8)):
            raise DataError(
                f"{path}: the arrays of this shard do not belong together; delete the file and build it again"
            )

    @cached_property
    def ends(self) -> Longs:
        """[documents + 1]: 0, then where each document ends."""
        ends = np.concatenate([np.zeros(1, np.int64), self.file.read("ends")])
        if ends[-1] != self.tokens or (np.diff(ends) <= 0).any():
            raise DataError(
                f"{self.path}: the borders of its documents are not in order; delete the file and build it again"
            )
        return ends

    def read(self, document: int, start: int, size: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """`size` ids of `document` from `start`, and one more where it goes on, and which of the first `size` predict a
        learned token (None: all)."""
        first = int(self.ends[document]) + start
        tokens = self.file.read("tokens", first, min(first + size + 1, int(self.ends[document + 1])))
        if int(tokens.max(initial=0)) >= self.vocab_size:
            raise DataError(
                f"{self.path}: document {document} holds ids outside of the vocabulary of {self.vocab_size}"
            )
        if not self.masked:
            return tokens, None
        low = first // 8
        bits = np.unpackbits(self.file.read("learned", low, -(-(first + size) // 8)), bitorder="little")
        return tokens, bits[first - 8 * low : first - 8 * low + size]

    def where(self, document: int) -> str:
        """`file:line` of a document."""
        return f"{self.source}:{int(self.file.read('lines', document, document + 1)[0])}"


class Documents:
    """The documents of several shards, numbered through. `content` is one SHA-256 for all of them."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = [shard for shard in shards if shard.documents]
        self._starts = np.cumsum([0, *(shard.documents for shard in self.shards)]).tolist()
        self.contents = [shard.file.content for shard in self.shards]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def learned(self) -> int:
        """Tokens that carry loss, as the shards say."""
        return sum(int(shard.file.about["learned"]) for shard in self.shards)

    def sizes(self) -> Longs:
        """[documents] tokens of each."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(shard.ends) for shard in self.shards)])

    def marks(self) -> NDArray[np.uint64]:
        """[documents] 64 bits of a hash of each."""
        return np.concatenate([np.zeros(0, np.uint64), *(shard.file.read("marks") for shard in self.shards)])

    def divisible(self) -> NDArray[np.bool_]:
        """[documents] which may be split over rows: those of text."""
        return np.repeat([shard.kind == "text" for shard in self.shards], [shard.documents for shard in self.shards])

    def find(self, document: int) -> tuple[Shard, int]:
        """The shard of a document and its number there."""
        at = bisect_right(self._starts, document) - 1
        return self.shards[at], document - self._starts[at]

    def where(self, document: int) -> str:
        """`file:line` of a document."""
        shard, inside = self.find(document)
        return shard.where(inside)
