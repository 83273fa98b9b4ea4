"""Llama 1, 2 and Code Llama against the sentencepiece library and the published test vectors."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import sentencepiece

from herd.errors import TokenizerError
from herd.tokenizer.pieces import CONTROL, NORMAL, PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.tokenizer import texts
from tests.tokenizer.conftest import with_infill_pieces

INST = "[INST] <<SYS>>\nsysinfo\n<</SYS>>\n\nHello [/INST]"
VECTORS = {
    "Hello this is a test": [15043, 445, 338, 263, 1243],
    "Hi!": [6324, 29991],
    "[INST] 123 [/INST]": [518, 25580, 29962, 29871, 29896, 29906, 29941, 518, 29914, 25580, 29962],
    INST: [
        *[
            518,
            25580,
            29962,
            3532,
            14816,
            29903,
            6778,
            13,
            9675,
            3888,
            13,
            29966,
            829,
            14816,
            29903,
            6778,
            13,
            13,
            10994,
        ],
        *[518, 29914, 25580, 29962],
    ],
}
MANY = texts.ALL + texts.generate(6_000, seed=6)
MORE = pytest.param(texts.ALL + texts.generate(20_000, seed=6), marks=pytest.mark.slow, id="more")


def library(data: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    return processor


def random_ids(rng: random.Random, size: int) -> list[int]:
    """Ids that mix normal, byte, control and unknown pieces and lone spaces."""
    return [rng.choice([rng.randrange(259), rng.randrange(size), 0, 1, 2, 35]) for _ in range(rng.randrange(14))]


def test_vectors(llama2: SentencePieceTokenizer) -> None:
    assert {text: llama2.encode(text) for text in VECTORS} == VECTORS
    assert llama2.encode(INST, bos=True) == [1, *VECTORS[INST]]


@pytest.mark.parametrize("many", [pytest.param(MANY, id="many"), MORE])
def test_llama2_ids_equal_the_library(llama2: SentencePieceTokenizer, llama2_path: Path, many: list[str]) -> None:
    theirs = library(llama2_path.read_bytes()).encode(many)
    assert list(map(llama2.encode, many)) == theirs
    assert llama2.encode_batch(many, threads=1) == theirs


@pytest.mark.parametrize("many", [pytest.param(MANY, id="many"), MORE])
def test_tiny_ids_equal_the_library(tiny_sp: SentencePieceTokenizer, tiny_pieces: bytes, many: list[str]) -> None:
    assert list(map(tiny_sp.encode, many)) == library(tiny_pieces).encode(many)


def test_decoding_equals_the_library(tiny_sp: SentencePieceTokenizer, tiny_pieces: bytes) -> None:
    processor = library(tiny_pieces)
    rng = random.Random(1)
    for _ in range(5_000):
        ids = random_ids(rng, tiny_sp.vocab_size)
        assert tiny_sp.decode(ids) == processor.decode(ids), ids


def test_llama2_decoding_equals_the_library(llama2: SentencePieceTokenizer, llama2_path: Path) -> None:
    processor = library(llama2_path.read_bytes())
    rng = random.Random(2)
    for _ in range(3_000):
        ids = random_ids(rng, llama2.vocab_size)
        assert llama2.decode(ids) == processor.decode(ids), ids


def test_text_comes_back(tiny_sp: SentencePieceTokenizer) -> None:
    for text in MANY:
        if "▁" not in text:  # SentencePiece writes spaces that way and cannot tell them apart
            assert tiny_sp.decode(tiny_sp.encode(text, bos=True, eos=True)) == text


def test_bos_and_eos_are_added_once(tiny_sp: SentencePieceTokenizer) -> None:
    plain = tiny_sp.encode("Hello")
    assert tiny_sp.encode("Hello", bos=True, eos=True) == [1, *plain, 2]
    assert tiny_sp.encode("<s>Hello</s>", bos=True, eos=True, allow_special=True) == [1, *plain, 2]
    assert tiny_sp.encode("<s>Hello</s>", bos=True).count(1) == 1
    assert tiny_sp.encode("", bos=True) == [1]
    assert tiny_sp.encode("") == []
    assert tiny_sp.encode_batch(["Hello", ""], bos=True, eos=True) == [[1, *plain, 2], [1, 2]]


def test_each_stretch_between_specials_gets_its_own_prefix_space(tiny_sp: SentencePieceTokenizer) -> None:
    ids = tiny_sp.encode("<s>one</s><s>two</s>", allow_special=True)
    assert ids == [1, *tiny_sp.encode("one"), 2, 1, *tiny_sp.encode("two"), 2]


def test_no_special_id_comes_from_user_text(infill_sp: SentencePieceTokenizer) -> None:
    special = set(infill_sp.special.ids.values())
    assert len(special) >= 8
    for name in infill_sp.special.ids:
        shown = name.replace("▁", " ")
        for text in (name, shown, f"a{shown}b", f"x {shown} y", shown * 2, shown.strip()):
            assert not special & set(infill_sp.encode(text)), text


def test_infill_pieces_were_reachable_without_herd(infill_sp: SentencePieceTokenizer, tiny_pieces: bytes) -> None:
    """The reason for the rule above: the file as it is turns user text into the special id."""
    processor = library(with_infill_pieces(PieceModel.parse(tiny_pieces)).serialize())
    assert infill_sp.special.ids["▁<PRE>"] in processor.encode("x <PRE> y")


def test_families_and_stop_ids(infill_sp: SentencePieceTokenizer, tiny_sp: SentencePieceTokenizer) -> None:
    assert (tiny_sp.family, infill_sp.family) == ("llama2", "codellama")
    assert tiny_sp.special.stop == {2}
    assert infill_sp.special.stop == {2, infill_sp.special.ids["▁<EOT>"], infill_sp.special.ids["<step>"]}
    assert tiny_sp.special.get("▁<PRE>") is None
    assert (tiny_sp.special.unk, tiny_sp.special.pad) == (0, None)


def test_infill_text_has_no_prefix_space(infill_sp: SentencePieceTokenizer, tiny_pieces: bytes) -> None:
    processor = library(tiny_pieces)
    anchor = processor.encode("☺")
    for text in [*texts.CODE, "x", " x", "", "\n    return"]:
        ids = infill_sp.encode_infilling(text)
        assert ids == processor.encode("☺" + text)[len(anchor) :]
        assert infill_sp.decode_infilling(ids) == text
    assert infill_sp.decode(infill_sp.encode_infilling(" x")) == "x"  # which is why decode_infilling exists


def test_llama2_infill_as_in_metas_code(llama2: SentencePieceTokenizer, llama2_path: Path) -> None:
    processor = library(llama2_path.read_bytes())
    for text in MANY[:2_000]:
        ids = llama2.encode_infilling(text)
        assert ids == processor.encode("☺" + text)[2:]
        assert llama2.decode_infilling(ids) == processor.decode([processor.piece_to_id("☺"), *ids])[1:]


@pytest.mark.parametrize("text", ["a", "^", "0", " ", "\n", "😀", "'s"])
def test_one_megabyte_of_one_thing_takes_less_than_a_second(tiny_sp: SentencePieceTokenizer, text: str) -> None:
    megabyte = text * (1_000_000 // len(text.encode()))
    start = time.thread_time()  # CPU time: other processes of the machine do not count
    ids = tiny_sp.encode(megabyte)
    assert time.thread_time() - start < 1.0
    assert tiny_sp.decode(ids) == megabyte


def test_lone_surrogate_is_refused(tiny_sp: SentencePieceTokenizer) -> None:
    for call in (tiny_sp.encode, tiny_sp.encode_infilling, lambda text: tiny_sp.encode_batch([text])):
        with pytest.raises(TokenizerError, match=r"U\+DC80 at character 1"):
            call("é\udc80")


def test_unknown_id(tiny_sp: SentencePieceTokenizer) -> None:
    for id in (-1, tiny_sp.vocab_size):
        for call in (tiny_sp.bytes_of, tiny_sp.piece, lambda one: tiny_sp.decode([one])):
            with pytest.raises(TokenizerError, match=str(id)):
                call(id)


def test_pieces_and_bytes(tiny_sp: SentencePieceTokenizer) -> None:
    assert tiny_sp.piece(13) == "<0x0A>"
    assert tiny_sp.bytes_of(13) == b"\n"
    assert tiny_sp.bytes_of(1) == b""
    space = tiny_sp.model.pieces.index("▁") if "▁" in tiny_sp.model.pieces else None
    assert space is not None
    assert (tiny_sp.bytes_of(space), tiny_sp.first_bytes(space)) == (b" ", b"")
    assert tiny_sp.decode([1, 5, 2], skip_special=False) == "<s>\x02</s>"
    assert "llama2" in repr(tiny_sp)


def test_user_defined_pieces_are_text_but_not_from_user_text(tiny_pieces: bytes) -> None:
    model = PieceModel.parse(tiny_pieces)
    n = len(model.pieces)
    model = PieceModel(
        pieces=[*model.pieces, "<tool>"], scores=[*model.scores, 0.0], types=[*model.types, 4], dummy_prefix=True
    )
    tokenizer = SentencePieceTokenizer(model)
    assert n not in tokenizer.encode("x<tool>y")
    assert n in tokenizer.encode("x<tool>y", allow_special=True)
    assert tokenizer.decode([n]) == "<tool>"


def test_vocabulary_without_bos_is_refused(tiny_pieces: bytes) -> None:
    model = PieceModel.parse(tiny_pieces)
    with pytest.raises(TokenizerError, match="no control pieces <s> and </s>"):
        SentencePieceTokenizer(model.with_types([NORMAL if kind == CONTROL else kind for kind in model.types]))


def test_double_pieces_are_refused(tiny_pieces: bytes) -> None:
    model = PieceModel.parse(tiny_pieces)
    pieces = list(model.pieces)
    pieces[-1] = pieces[-2]
    with pytest.raises(TokenizerError, match="sentencepiece refuses"):
        SentencePieceTokenizer(PieceModel(pieces=pieces, scores=model.scores, types=model.types))
