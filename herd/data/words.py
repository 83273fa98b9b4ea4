"""Texts as sequences of words, and runs of words as numbers: what duplicates and leaks are found by. No torch.

Words are runs of letters, marks and digits in lower case; of scripts that put no spaces between words (Chinese, Japanese, Thai,
Lao, Khmer, Burmese) every character with its marks is one. Punctuation, spaces and case are no difference.
"""

from __future__ import annotations

import re
from hashlib import blake2b

import numpy as np
import regex
from numpy.typing import NDArray

from herd.data.order import mixed

__all__ = ["Hashes", "grams", "word_hashes", "words"]

Hashes = NDArray[np.uint64]

_ASCII = re.compile(r"[a-z0-9]+")
_WORDS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*|[\p{L}\p{M}\p{N}]+", regex.V1
)

_PLAIN = re.compile(r"[^\W_]+")  # three times as fast, and the same where none of these stands in the text:
_HARD = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0590-\u1dff\u20d0-\u20ff\u2cef-\u2cf1\u2d7f\u2de0-\u2dff\u2e80-\ud7ff\uf900-\uffff\U00010000-\U0010ffff]"
)

_BASE = np.uint64(0x9E3779B97F4A7C15)
CACHED = 1 << 19
"""Words whose hashes are kept: some 60 MB at most."""


def words(text: str) -> list[str]:
    """The words of `text`, in order."""
    lower = text.lower()
    if lower.isascii():
        return _ASCII.findall(lower)
    return (_WORDS if _HARD.search(lower) else _PLAIN).findall(lower)


class _Known(dict[str, int]):
    """Words to 64-bit hashes that are the same everywhere and always."""

    def __missing__(self, word: str) -> int:
        if len(self) >= CACHED:
            self.clear()
        value = int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        self[word] = value
        return value


_known = _Known()


def word_hashes(found: list[str]) -> Hashes:
    """[W] uint64: a hash of each word."""
    return np.fromiter(map(_known.__getitem__, found), np.uint64, len(found))


def grams(hashes: Hashes, n: int) -> Hashes:
    """[W - n + 1] uint64: a hash of each run of `n` words; empty when there are fewer."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    found = np.zeros(count, np.uint64)
    for k in range(n):
        found = found * _BASE + hashes[k : k + count]
    return mixed(found)
