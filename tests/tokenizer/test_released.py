"""Released vocabularies are recognised by what they contain, and what converters lose is put back exactly."""

from __future__ import annotations

from herd.tokenizer.released import is_llama2, llama2_scores, released_family
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.tokenizer.conftest import opened


def test_ranks(family: str) -> None:
    ranks = list(opened(family).ranks)
    assert released_family(ranks) == family
    ranks[300], ranks[301] = ranks[301], ranks[300]
    assert released_family(ranks) is None
    assert released_family(ranks[:-1]) is None


def test_llama2_pieces_and_scores(llama2: SentencePieceTokenizer) -> None:
    pieces = list(llama2.model.pieces)
    assert is_llama2(pieces)
    assert is_llama2([*pieces, "▁<PRE>"])
    assert not is_llama2(pieces[:-1])
    assert not is_llama2([*pieces[:-1], "x"])
    assert llama2_scores(pieces) == list(llama2.model.scores)
