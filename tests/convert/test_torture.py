"""The list of hard texts: long enough, all different, all encodable, and hard: it tells vocabularies and readers apart."""

from __future__ import annotations

from herd.convert.torture import texts
from tests.vocabularies import llama3, pieces_of, trained_pieces


def test_the_list_is_what_it_claims_to_be() -> None:
    found = texts()
    assert len(found) >= 300
    assert len(set(found)) == len(found)
    assert any(len(text) >= 10_000 for text in found)
    assert "" in found
    assert any(text.startswith("\ufeff") for text in found)
    for text in found:
        text.encode()  # no lone surrogates


def test_every_text_survives_both_kinds_of_vocabulary() -> None:
    pieces = pieces_of(trained_pieces()).tokenizer
    for text in texts():
        assert llama3().decode(llama3().encode(text)) == text
        spaced = text.replace("\u2581", " ")  # SentencePiece writes spaces so
        assert pieces.decode(pieces.encode(text)).removeprefix(" ") == spaced.removeprefix(" ")
