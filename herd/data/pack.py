"""Documents to rows of equal length, without letting documents see each other. No torch.

A row is tokens, labels and positions. Positions restart at 0 at each document, which is the only record of document borders:
the attention mask (`herd.model.attend.Packed`) and the rotary angles are both made from them.

`plan` says which pieces of which documents make up each row; nothing is ever dropped by it, and a piece that goes on in
another row still learns its last token's successor. `PackedRows` reads rows of a plan from shards; `Rows` holds rows in memory.

Letters: N rows, S row length, P pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from herd.data.config import PackKind
from herd.data.encode import IGNORE, Example
from herd.data.order import key_of, permuted
from herd.data.shards import Documents

__all__ = ["PackedRows", "Plan", "Rows", "pack_stream", "plan"]

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """Pieces of documents in rows: row r holds pieces first[r]..first[r+1]; piece p is `size` tokens of `document` from `start`.

    first [N + 1], document, start, size [P]: int64.
    """

    first: Longs
    document: Longs
    start: Longs
    size: Longs

    def __len__(self) -> int:
        return len(self.first) - 1

    def followed_by(self, other: Plan, documents: int) -> Plan:
        """The rows of both; the documents of `other` are numbered from `documents` on."""
        return Plan(
            np.concatenate([self.first, self.first[-1] + other.first[1:]]),
            np.concatenate([self.document, other.document + documents]),
            np.concatenate([self.start, other.start]),
            np.concatenate([self.size, other.size]),
        )


def plan(sizes: Longs, length: int, kind: PackKind) -> Plan:
    """Rows of `length` for documents of `sizes` tokens; one that is longer than a row is split, full rows first.

    best-fit: longest first, each into the fullest row that still takes it. concat: back to back in a fixed random order, cut
    where a row ends; the last row is padded. none: a row for each document (or part of one). Neighbours in a file (chapters
    of a book) are neighbours in no row but by chance.
    """
    order = permuted(np.arange(len(sizes)), max(1, len(sizes)), key_of("plan", len(sizes)))
    if kind == "concat":
        return _concat(sizes, order, length)
    full = sizes // length
    rest = sizes - full * length
    document = np.repeat(np.arange(len(sizes)), full)
    whole = Plan(
        np.arange(len(document) + 1),
        document,
        length * (np.arange(len(document)) - np.repeat(np.cumsum(full) - full, full)),
        np.full(len(document), length, np.int64),
    )
    order = order[rest[order] > 0]
    if kind == "none":
        row = np.arange(len(order))
    else:
        order = order[np.argsort(-rest[order], kind="stable")]
        row = _best_fit(rest[order].tolist(), length)
    by_row = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=int(row.max(initial=-1)) + 1)
    document = order[by_row]
    return Plan(
        np.concatenate([whole.first, len(whole.document) + np.cumsum(counts)]),
        np.concatenate([whole.document, document]),
        np.concatenate([whole.start, full[document] * length]),
        np.concatenate([whole.size, rest[document]]),
    )


WORD = 1024
"""Rooms that one integer of `_best_fit` stands for: so short that rows of 131,072 positions cost no more than those of 1,024."""


def _best_fit(sizes: Sequence[int], length: int) -> Longs:
    """The row of each piece, longest first: the one with the least room that is enough, else a new one.

    Bit r of word w says that some row has w * WORD + r places left, bit w of `words` that word w has any, so the best one is
    found without a search.
    """
    having: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = [0] * (length // WORD + 1)
    words = rows = 0
    found = np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes):
        word, bit = divmod(size, WORD)
        if fits := rooms[word] >> bit:
            room = size + (fits & -fits).bit_length() - 1
        elif fits := words >> (word + 1):
            word += (fits & -fits).bit_length()
            room = word * WORD + (rooms[word] & -rooms[word]).bit_length() - 1
        else:
            room = -1
        if room < 0:
            room, row = length, rows
            rows += 1
        else:
            row = having[room].pop()
            if not having[room]:
                rooms[word] &= ~(1 << room % WORD)
                if not rooms[word]:
                    words &= ~(1 << word)
        found[i] = row
        if left := room - size:
            having[left].append(row)
            rooms[left // WORD] |= 1 << left % WORD
            words |= 1 << left // WORD
    return found


def _concat(sizes: Longs, order: Longs, length: int) -> Plan:
    ends = np.cumsum(sizes[order])
    total = int(ends[-1]) if len(ends) else 0
    begins = ends - sizes[order]
    cuts = np.union1d(begins, np.arange(0, total, length))
    at = np.searchsorted(begins, cuts, side="right") - 1
    first = np.searchsorted(cuts, np.arange(0, total, length))
    return Plan(
        np.append(first, len(cuts)).astype(np.int64),
        order[at] if len(at) else at,
        cuts - begins[at] if len(at) else cuts,
        np.diff(np.append(cuts, total)),
    )


class PackedRows:
    """Rows of a plan over `chosen` documents of shards (the plan's document i is chosen[i]). Padding is `pad`."""

    def __init__(self, documents: Documents, chosen: Longs, rows: Plan, length: int, pad: int) -> None:
        self.documents, self.chosen, self.plan, self.length, self.pad = documents, chosen, rows, length, pad

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def content(self) -> str:
        """SHA-256 of the shards' contents and the plan."""
        return self._content

    @cached_property
    def _content(self) -> str:
        digest = sha256(repr((self.documents.contents, self.length)).encode())
        for array in (self.chosen, self.plan.first, self.plan.document, self.plan.start, self.plan.size):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Of all rows, without padding."""
        return int(self.plan.size.sum())

    def filled(self, index: int) -> int:
        """Positions of a row that are no padding."""
        return int(self.plan.size[self.plan.first[index] : self.plan.first[index + 1]].sum())

    def _pieces(self, index: int) -> list[tuple[int, int, int]]:
        first, last = int(self.plan.first[index]), int(self.plan.first[index + 1])
        chosen = self.chosen[self.plan.document[first:last]].tolist()
        return list(zip(chosen, self.plan.start[first:last].tolist(), self.plan.size[first:last].tolist(), strict=True))

    def read(self, index: int) -> tuple[Longs, Longs, Longs]:
        """Tokens, labels and positions of a row, each [S] int64. Raises DataError when its shard is damaged."""
        tokens = np.full(self.length, self.pad, np.int64)
        labels = np.full(self.length, IGNORE, np.int64)
        positions = np.arange(self.length)
        at = 0
        for document, start, size in self._pieces(index):
            shard, inside = self.documents.find(document)
            ids, learned = shard.read(inside, start, size)
            end = at + size
            tokens[at:end] = ids[:size]
            follows = ids[1:].astype(np.int64)  # one short where the document ends here
            labels[at : at + len(follows)] = (
                follows if learned is None else np.where(learned[: len(follows)], follows, IGNORE)
            )
            positions[at:end] -= at
            at = end
        positions[at:] -= at
        return tokens, labels, positions

    def where(self, index: int) -> str:
        """`file:line` of every document in a row."""
        return ", ".join(self.documents.where(document) for document, _, _ in self._pieces(index))


@dataclass(frozen=True)
class Rows:
    """N packed rows in memory: tokens, labels, positions, each [N, S] int32. Padding is a document of its own, never learned."""

    tokens: Ints
    labels: Ints
    positions: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """S, positions of a row."""
        return self.tokens.shape[1]

    @property
    def learned(self) -> int:
        """Number of positions that carry loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def content(self) -> str:
        """SHA-256 of the rows."""
        return self._content

    @cached_property
    def _content(self) -> str:
        arrays = (self.tokens, self.labels, self.positions)
        return sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()

    def read(self, index: int) -> tuple[Longs, Longs, Longs]:
        """Tokens, labels and positions of a row, each [S] int64."""
        tokens, labels, positions = (
            array[index].astype(np.int64) for array in (self.tokens, self.labels, self.positions)
        )
        return tokens, labels, positions

    def filled(self, index: int) -> int:
        """Rows in memory do not tell padding from text: all positions."""
        return self.length

    def where(self, index: int) -> str:
        """Rows in memory know only their number."""
        return f"row {index}"


def pack_stream(examples: Iterable[Example], length: int) -> Rows:
    """Examples back to back, cut wherever a row of `length` ends; the unfinished last row is left out.

    For pretraining: no padding, and a document that is cut goes on in the next row as if it began there, at position 0.
    """
    tokens: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for example in examples:
        starts.append(len(tokens))
        tokens.extend(example.tokens)
        labels.extend(example.labels)
    count = len(tokens) // length
    total = count * length
    begin = np.zeros(total, dtype=np.int64)
    marks = np.array([start for start in starts if start < total], dtype=np.int64)
    begin[marks] = marks
    begin[::length] = np.arange(0, total, length)
    positions = np.arange(total, dtype=np.int64) - np.maximum.accumulate(begin) if total else begin
    shape = (count, length)
    return Rows(
        np.array(tokens[:total], dtype=np.int32).reshape(shape),
        np.array(labels[:total], dtype=np.int32).reshape(shape),
        positions.astype(np.int32).reshape(shape),
    )
