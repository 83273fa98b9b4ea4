"""The SentencePiece file read and written by hand, against the library."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece

from herd.errors import CheckpointError, HerdError, TokenizerError
from herd.tokenizer.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, PieceModel, byte_piece
from tests.tokenizer import texts


def library(data: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    return processor


def rebuilt(model: PieceModel) -> PieceModel:
    """The same lists without the file they came from, so that the file is written anew."""
    return PieceModel(pieces=model.pieces, scores=model.scores, types=model.types, dummy_prefix=model.dummy_prefix)


def test_parsed_lists_are_the_librarys(tiny_pieces: bytes) -> None:
    model, processor = PieceModel.parse(tiny_pieces), library(tiny_pieces)
    ids = list(range(processor.vocab_size()))
    assert list(model.pieces) == processor.id_to_piece(ids)
    assert list(model.scores) == processor.get_score(ids)
    assert [kind == BYTE for kind in model.types] == processor.is_byte(ids)
    assert [kind == CONTROL for kind in model.types] == processor.is_control(ids)
    assert [kind == UNKNOWN for kind in model.types] == processor.is_unknown(ids)
    assert model.dummy_prefix


def test_a_written_file_gives_the_same_ids(tiny_pieces: bytes) -> None:
    model = PieceModel.parse(tiny_pieces)
    assert model.serialize() is tiny_pieces
    original, written = library(tiny_pieces), library(rebuilt(model).serialize())
    many = texts.ALL + texts.generate(3_000, seed=10)
    assert written.encode(many) == original.encode(many)
    assert PieceModel.parse(rebuilt(model).serialize()).pieces == model.pieces


def test_a_written_llama2_file_gives_the_same_ids(llama2_path: Path) -> None:
    data = llama2_path.read_bytes()
    original, written = library(data), library(rebuilt(PieceModel.parse(data)).serialize())
    many = texts.ALL + texts.generate(3_000, seed=11)
    assert written.encode(many) == original.encode(many)
    assert written.decode(original.encode(many)) == original.decode(original.encode(many))


def test_without_dummy_prefix(tiny_pieces: bytes) -> None:
    model = PieceModel.parse(tiny_pieces)
    bare = PieceModel(pieces=model.pieces, scores=model.scores, types=model.types, dummy_prefix=False)
    assert library(bare.serialize()).encode("the") != library(tiny_pieces).encode("the")
    assert not PieceModel.parse(bare.serialize()).dummy_prefix


def test_added_pieces(tiny_pieces: bytes) -> None:
    model = PieceModel.parse(tiny_pieces)
    n = len(model.pieces)
    more = model.with_added([("<pad>", n), ("<x>", n + 1)])
    assert (more.pieces[n:], more.types[n:]) == (["<pad>", "<x>"], [CONTROL, CONTROL])
    with pytest.raises(TokenizerError, match=f"after {n} pieces they must be {n}"):
        model.with_added([("<pad>", n + 1)])


def test_every_truncation_is_an_error(tiny_pieces: bytes) -> None:
    rng = random.Random(1)
    for size in [0, 1, 2, 3, *(rng.randrange(len(tiny_pieces)) for _ in range(60)), len(tiny_pieces) - 1]:
        with pytest.raises(HerdError):
            PieceModel.parse(tiny_pieces[:size], "tokenizer.model")


def test_random_damage_never_escapes_as_another_error(tiny_pieces: bytes) -> None:
    rng = random.Random(2)
    for _ in range(150):
        data = bytearray(tiny_pieces)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            model = PieceModel.parse(bytes(data))
        except HerdError:
            continue
        assert len(model.pieces) == len(model.scores)


@pytest.mark.parametrize("data", [b"garbage", b"\x00" * 50, b"\xff" * 50, b"PK\x03\x04" + b"\x00" * 40])
def test_other_files_are_refused_with_an_offset(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"byte \d+: ") as caught:
        PieceModel.parse(data, "tokenizer.model")
    assert caught.value.offset is not None


def test_a_piece_that_is_not_utf8(tiny_pieces: bytes) -> None:
    at = tiny_pieces.index("▁".encode())
    data = tiny_pieces[:at] + b"\xff" + tiny_pieces[at + 1 :]
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        PieceModel.parse(data)


def train(**changes: object) -> bytes:
    import io

    out = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "vocab_size": 420, "minloglevel": 2, **changes}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts.CODE * 3), model_writer=out, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 380}, "model_type is not BPE"),
        ({"byte_fallback": False, "vocab_size": 200}, "byte_fallback is off"),
        ({"normalization_rule_name": "nmt_nfkc"}, "character map"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is on"),
        ({"treat_whitespace_as_suffix": True}, "whitespace_as_suffix is on"),
    ],
)
def test_other_rules_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        PieceModel.parse(train(**changes))


@pytest.mark.parametrize(
    ("piece", "kind", "message"),
    [
        ("", NORMAL, "piece 5 is empty"),
        ("x", BYTE, "has the byte type"),
        ("x", NORMAL, "255 byte pieces"),
        ("<0x02>", UNKNOWN, "255 byte pieces"),
    ],
)
def test_lists_that_are_no_vocabulary(tiny_pieces: bytes, piece: str, kind: int, message: str) -> None:
    model = PieceModel.parse(tiny_pieces)
    pieces, types = list(model.pieces), list(model.types)
    pieces[5], types[5] = piece, kind
    with pytest.raises(TokenizerError, match=message):
        PieceModel(pieces=pieces, scores=model.scores, types=types)


def test_lists_of_unequal_length(tiny_pieces: bytes) -> None:
    model = PieceModel.parse(tiny_pieces)
    with pytest.raises(TokenizerError, match="equally long"):
        PieceModel(pieces=model.pieces, scores=model.scores[:-1], types=model.types)


def test_two_unknown_pieces(tiny_pieces: bytes) -> None:
    model = PieceModel.parse(tiny_pieces)
    types = list(model.types)
    types[1] = UNKNOWN
    with pytest.raises(TokenizerError, match="exactly one piece of the unknown type"):
        PieceModel(pieces=model.pieces, scores=model.scores, types=types)


@pytest.mark.parametrize(
    ("piece", "value"), [("<0x0A>", 10), ("<0xff>", 255), ("<0xG0>", None), ("<0x0>", None), ("a", None)]
)
def test_byte_piece(piece: str, value: int | None) -> None:
    assert byte_piece(piece) == value
