"""What each id of a sequence is: for people who want to see their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Explained", "explain"]


@dataclass(frozen=True, slots=True)
class Explained:
    """One id: its printable piece, the bytes it adds to the text, and whether it is special. `learn` is its loss mask."""

    id: int
    piece: str
    data: bytes
    special: bool
    learn: bool | None = None


def explain(tokenizer: Tokenizer, ids: Sequence[int], loss_mask: Sequence[bool] | None = None) -> list[Explained]:
    """One row per id. Raises TokenizerError for an unknown id."""
    special = set(tokenizer.special.ids.values())
    learn: Sequence[bool | None] = [None] * len(ids) if loss_mask is None else loss_mask
    return [
        Explained(id, tokenizer.piece(id), tokenizer.bytes_of(id), id in special, mask)
        for id, mask in zip(ids, learn, strict=True)
    ]
