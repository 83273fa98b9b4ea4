"""A vocabulary of single bytes and a few words, for replies of a given form."""

from __future__ import annotations

from functools import cache

from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.tokenizer import SpecialTokens

__all__ = ["small"]

ALL_BYTES = [bytes([i]) for i in range(256)]
WORDS = [
    b'{"',
    b'":',
    b'": "',
    b'",',
    b'"}',
    b"}}",
    b"true",
    b"null",
    b"12",
    b"-0.5",
    b"\n  ",
    b"abc",
    b"ja",
    "é".encode(),
    b"[]",
]


@cache
def small() -> TiktokenTokenizer:
    """271 byte-BPE ids and two special ones that end a reply."""
    ranks = ALL_BYTES + WORDS
    ids = {
        name: len(ranks) + i
        for i, name in enumerate(("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|image|>"))
    }
    bos, eos, eot, _ = ids.values()
    return TiktokenTokenizer(ranks, "llama3", SpecialTokens(bos=bos, eos=eos, stop=frozenset({eos, eot}), ids=ids))
