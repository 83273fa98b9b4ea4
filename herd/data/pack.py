"""Examples to rows of equal length, without letting documents see each other.

A row is tokens, labels and positions. Positions restart at 0 at each document, which is the only record of document borders:
the attention mask (`herd.model.attend.Packed`) and the rotary angles are both made from them.

Letters: N rows, S row length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from herd.data.encode import IGNORE, Example
from herd.data.read import DataError

__all__ = ["Rows", "concatenate", "pack_stream", "pack_whole"]

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Rows:
    """N packed rows: tokens, labels and positions, each [N, S] int32. Padding has label IGNORE and its own document."""

    tokens: Ints
    labels: Ints
    positions: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def learned(self) -> int:
        """Number of positions that carry loss."""
        return int((self.labels != IGNORE).sum())


def concatenate(parts: Sequence[Rows]) -> Rows:
    """One Rows of all `parts`, in order. Their row lengths must agree."""
    lengths = {part.tokens.shape[1] for part in parts}
    if len(lengths) != 1:
        raise DataError(f"rows of different lengths cannot be joined: {sorted(lengths)}")
    return Rows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.positions for part in parts]),
    )


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


def pack_whole(examples: Sequence[Example], length: int, pad: int) -> tuple[Rows, list[int]]:
    """Whole examples into rows by best fit, longest first; nothing is cut.

    Returns the rows and the indices of examples longer than `length`, which were left out: the caller says so.
    """
    too_long = [i for i, example in enumerate(examples) if len(example) > length]
    order = sorted((i for i, example in enumerate(examples) if len(example) <= length), key=lambda i: -len(examples[i]))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free positions, row), sorted: the first that is large enough is the best fit
    for i in order:
        size = len(examples[i])
        at = bisect_left(room, (size, -1))
        if at == len(room):
            rows.append([i])
            free, row = length, len(rows) - 1
        else:
            free, row = room.pop(at)
            rows[row].append(i)
        if free > size:
            insort(room, (free - size, row))
    tokens = np.full((len(rows), length), pad, dtype=np.int32)
    labels = np.full((len(rows), length), IGNORE, dtype=np.int32)
    positions = np.zeros((len(rows), length), dtype=np.int32)
    for row, members in enumerate(rows):
        at = 0
        for i in members:
            end = at + len(examples[i])
            tokens[row, at:end] = examples[i].tokens
            labels[row, at:end] = examples[i].labels
            positions[row, at:end] = np.arange(end - at)
            at = end
        positions[row, at:] = np.arange(length - at)
    return Rows(tokens, labels, positions), too_long
