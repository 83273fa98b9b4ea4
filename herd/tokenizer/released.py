"""Fingerprints of the released vocabularies, so that they are recognised by content in any file format.

Files made by converters sometimes lose what a vocabulary needs: GGUF files without scores or pre-tokenizer name, tokenizer.json
files whose merges are in another order (huggingface/transformers issues 45488 and 45920). Where the tokens are Meta's own, what
is lost is known and need not be guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from herd.tokenizer.special import RANKS
from herd.tokenizer.tokenizer import Family

__all__ = ["LLAMA2_PIECES", "is_llama2", "llama2_scores", "released_family"]

# sha256 of the bytes of all ranks in order, joined by newlines.
_RANKS_SHA256: dict[str, Family] = {
    "8ebd67384575e28b075b69f0999346a969a0d2f3a1c74ad837db9a85908dee19": "llama3",
    "894265db543ddfb970569d73bbe95c662ea7fa90ebbf165c9263e11298c55826": "llama4",
}
# sha256 of the 32,000 pieces of Llama 1 and 2 in order, joined by zero characters.
_LLAMA2_SHA256 = "b43c657d6772da32c3e0971ab610fc3d6a7e45089582758d1bc5160e5cdbe588"
LLAMA2_PIECES = 32_000
_FIRST_NORMAL = 259  # after <unk>, <s>, </s> and the byte pieces
_LAST_SCORE = -1e9


def released_family(ranks: Sequence[bytes]) -> Family | None:
    """The family whose merge ranks these are, or None."""
    if len(ranks) not in RANKS.values():
        return None
    return _RANKS_SHA256.get(hashlib.sha256(b"\n".join(ranks)).hexdigest())


def is_llama2(pieces: Sequence[str]) -> bool:
    """Whether these are the 32,000 pieces of Llama 1 and 2, alone or with more behind them (Code Llama, added tokens)."""
    if len(pieces) < LLAMA2_PIECES:
        return False
    return hashlib.sha256("\0".join(pieces[:LLAMA2_PIECES]).encode()).hexdigest() == _LLAMA2_SHA256


def llama2_scores(pieces: Sequence[str]) -> list[float]:
    """Meta's scores of the Llama 2 pieces: merge order is id order, except that runs of spaces merge last of all."""
    return [
        0.0 if id < _FIRST_NORMAL else _LAST_SCORE if not piece.strip("▁") else float(_FIRST_NORMAL - id)
        for id, piece in enumerate(pieces)
    ]
