"""Streaming: whatever the ids and wherever they are pushed, the text is decode's, and no half character comes out."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from herd.errors import TokenizerError
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.stream import Detokenizer
from herd.tokenizer.tokenizer import Tokenizer
from tests.tokenizer import texts
from tests.tokenizer.conftest import opened


def push_all(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = Detokenizer(tokenizer, **options)
    return [*(stream.push(id) for id in ids), stream.flush()]


def check_valid_text(tokenizer: Tokenizer, text: str) -> None:
    """Stream the ids of a text: after each id exactly the characters that its bytes completed."""
    ids = tokenizer.encode(text)
    parts = push_all(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert parts[-1] == ""  # nothing of a valid text is left over
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_text_streams_as_it_decodes(family: str) -> None:
    for text in texts.ALL + texts.generate(2_000, seed=7):
        check_valid_text(opened(family), text)


def test_text_streams_as_it_decodes_with_pieces(tiny_sp: SentencePieceTokenizer) -> None:
    for text in texts.ALL + texts.generate(2_000, seed=8):
        check_valid_text(tiny_sp, text)


def random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Ids that break characters: single bytes, pieces that begin or end inside one, special tokens."""
    special = sorted(tokenizer.special.ids.values())
    emoji = tokenizer.encode("🙂漢é👍🏽")
    kinds = [lambda: rng.choice(emoji), lambda: rng.randrange(300), lambda: rng.randrange(tokenizer.vocab_size)]
    kinds.append(lambda: rng.choice(special))
    return [rng.choice(kinds)() for _ in range(rng.randrange(1, 12))]


@pytest.mark.parametrize("skip_special", [True, False])
def test_any_ids_stream_as_they_decode(family: str, skip_special: bool) -> None:
    check_any_ids(opened(family), skip_special)


@pytest.mark.parametrize("skip_special", [True, False])
def test_any_ids_stream_as_they_decode_with_pieces(infill_sp: SentencePieceTokenizer, skip_special: bool) -> None:
    check_any_ids(infill_sp, skip_special)


def check_any_ids(tokenizer: Tokenizer, skip_special: bool) -> None:
    rng = random.Random(9)
    for _ in range(4_000):
        ids = random_ids(rng, tokenizer)
        parts = push_all(tokenizer, ids, skip_special=skip_special)
        assert "".join(parts) == tokenizer.decode(ids, skip_special=skip_special), ids


def test_a_replacement_character_waits_until_nothing_can_complete_it(family: str) -> None:
    """Every prefix of a stream is a prefix of what decode gives for any longer stream, byte by byte."""
    tokenizer = opened(family)
    single = {tokenizer.bytes_of(id)[0]: id for id in range(256)}
    ids = [single[byte] for byte in "é漢🙂a".encode()]
    assert push_all(tokenizer, ids) == ["", "é", "", "", "漢", "", "", "", "🙂", "a", ""]
    cut_off = push_all(tokenizer, ids[:7])
    assert cut_off[5:] == ["", "", "\ufffd"]  # two bytes of the emoji: only the end of the stream gives them up
    broken = push_all(tokenizer, [*ids[:7], single[0x41]])
    assert broken[-2:] == ["\ufffdA", ""]


def test_leading_space_of_a_sequence(tiny_sp: SentencePieceTokenizer) -> None:
    ids = tiny_sp.encode("the the", bos=True)
    assert "".join(push_all(tiny_sp, ids)) == "the the"
    assert "".join(push_all(tiny_sp, ids, follows_text=True)) == " the the"
    stream = Detokenizer(tiny_sp)
    for _ in range(2):  # flush starts a new sequence
        assert "".join([*map(stream.push, ids), stream.flush()]) == "the the"


def test_middle_streams_as_decode_infilling(infill_sp: SentencePieceTokenizer) -> None:
    for text in texts.CODE:
        ids = infill_sp.encode_infilling(text)
        assert "".join(push_all(infill_sp, ids, follows_text=True)) == infill_sp.decode_infilling(ids) == text


def test_every_split_of_a_conversation(family: str) -> None:
    """Decoding the two halves of a stream in one detokenizer gives the whole, wherever it is cut."""
    tokenizer = opened(family)
    ids = [*tokenizer.encode("👩🏿\u200d🚀 Ünïcödé — 漢字\n\n", bos=True), tokenizer.special.eos]
    whole = tokenizer.decode(ids)
    for cut in range(len(ids) + 1):
        stream = Detokenizer(tokenizer)
        first = "".join(map(stream.push, ids[:cut]))
        assert whole.startswith(first)
        assert first + "".join(map(stream.push, ids[cut:])) + stream.flush() == whole
    lengths = [len(tokenizer.decode(ids[:cut])) for cut in range(len(ids) + 1)]
    assert all(a <= b + 3 for a, b in pairwise(lengths))


def test_unknown_id() -> None:
    with pytest.raises(TokenizerError, match="999999"):
        Detokenizer(opened("llama3")).push(999_999)
