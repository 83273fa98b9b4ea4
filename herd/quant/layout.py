"""Sizes of packed integers, for headers: no torch."""

from __future__ import annotations

__all__ = ["words_of"]


def words_of(count: int, bits: int) -> int:
    """32-bit words that hold `count` numbers of `bits` bits, packed without gaps."""
    return -(-count * bits // 32)
