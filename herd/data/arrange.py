"""Which documents of a source become rows, and the plan of their rows, kept on disk beside the shards. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herd.data.config import LongRows, PackKind
from herd.data.pack import PackedRows, Plan, plan
from herd.data.sections import Sections, write_sections
from herd.data.shards import Documents
from herd.errors import DataError

__all__ = ["Arranged", "Arrangement", "arrange", "held_out"]

VERSION = 1
"""Raised whenever the same documents would give other rows."""

PLAN = ("chosen", "first", "document", "start", "size")

SHOWN = 5
"""Long documents that a message names."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How documents become rows: `length` and `pack`, what is done about `long` ones, and which are kept from training.

    `share` of the documents is held out, by a hash of their tokens: copies of a document are on the same side. With
    `inverse` those are the ones that are taken.
    """

    length: int
    pack: PackKind
    long: LongRows
    share: float = 0.0
    inverse: bool = False


@dataclass(frozen=True, slots=True)
class Arranged:
    """Rows, and what happened to documents: how many were split, left out as too long (some by name), and held out."""

    rows: PackedRows
    split: int
    too_long: int
    named: tuple[str, ...]
    held_out: int

    @property
    def padding(self) -> float:
        """Share of all positions that hold nothing."""
        places = len(self.rows) * self.rows.length
        return 1 - self.rows.tokens / places if places else 0.0


def held_out(marks: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which documents the hash of their tokens keeps from training."""
    return marks < np.uint64(min(int(share * 2**64), 2**64 - 1))


def arrange(documents: Documents, how: Arrangement, pad: int, root: Path) -> Arranged:
    """The rows of `documents`. The plan is taken from `root` when it was made before.

    Text that is longer than a row is split. A conversation or completion is whole in every packing, because half of one teaches
    to answer what was never asked: those that are too long are left out, or raise DataError with their names (`how.long`).
    """
    key = sha256(repr((VERSION, documents.contents, how)).encode()).hexdigest()[:20]
    path = root / "plans" / f"{key}.rows"
    try:
        kept = Sections(path) if path.exists() else None
    except DataError:
        kept = None  # damaged: made again
    if kept is not None:
        told, arrays = kept.about, {name: kept.read(name) for name in PLAN}
    else:
        told, arrays = _made(documents, how)
        with contextlib.suppress(DataError):  # shards that somebody else keeps may lie in a folder that is read only
            write_sections(path, told, arrays)
    rows = Plan(*(arrays[name] for name in PLAN[1:]))
    return Arranged(
        PackedRows(documents, arrays["chosen"], rows, how.length, pad),
        int(told["split"]),
        int(told["too_long"]),
        tuple(documents.where(i) + f" ({size} tokens)" for i, size in told["named"]),
        int(told["held_out"]),
    )


def _made(documents: Documents, how: Arrangement) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What is said of a plan, and its arrays."""
    sizes = documents.sizes()
    out = held_out(documents.marks(), how.share) if how.share else np.zeros(len(sizes), bool)
    taken = out if how.inverse else ~out
    long, divisible = taken & (sizes > how.length), documents.divisible()
    dropped = long & ~divisible
    if how.long == "stop" and dropped.any():
        raise DataError(_too_long(documents, np.flatnonzero(dropped).tolist(), sizes, how.length))
    chosen = np.flatnonzero(taken & ~dropped)
    if how.pack == "concat":  # only text is cut where rows end
        text, whole = chosen[divisible[chosen]], chosen[~divisible[chosen]]
        chosen = np.concatenate([text, whole])
        made = plan(sizes[text], how.length, "concat").followed_by(
            plan(sizes[whole], how.length, "best-fit"), len(text)
        )
    else:
        made = plan(sizes[chosen], how.length, how.pack)
    told = {
        "split": int((long & ~dropped).sum()),
        "too_long": int(dropped.sum()),
        "named": [[i, int(sizes[i])] for i in np.flatnonzero(dropped)[:SHOWN].tolist()],
        "held_out": int(out.sum()),
    }
    arrays = {"chosen": chosen, "first": made.first, "document": made.document, "start": made.start, "size": made.size}
    return told, arrays


def _too_long(documents: Documents, refused: Sequence[int], sizes: NDArray[np.int64], length: int) -> str:
    shown = ", ".join(f"{documents.where(i)} ({int(sizes[i])} tokens)" for i in refused[:SHOWN])
    longest = int(sizes[list(refused)].max())
    more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    return (
        f"{len(refused)} of {len(documents)} documents are longer than a row of {length} tokens, the longest {longest}: "
        f"{shown}{more}. Raise data.length, or leave them out with data.long_rows: skip"
    )
