"""The vocabulary inside GGUF metadata gives the ids of Meta's files, and says which key it cannot use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from herd.errors import TokenizerError
from herd.tokenizer.bytelevel import to_alphabet
from herd.tokenizer.files import TokenizerFilesWarning
from herd.tokenizer.gguf import tokenizer_from_gguf
from herd.tokenizer.pieces import CONTROL, NORMAL, UNUSED, USER_DEFINED, PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import llama3_names
from herd.tokenizer.tiktoken import TiktokenTokenizer
from tests.tokenizer import texts
from tests.tokenizer.conftest import opened, with_infill_pieces

MANY = texts.ALL + texts.generate(1_500, seed=13)
PRE = {"llama3": "llama-bpe", "llama4": "llama4"}


def byte_metadata(tokenizer: TiktokenTokenizer, **more: Any) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a byte-BPE vocabulary."""
    n = len(tokenizer.ranks)
    names = [tokenizer.piece(id) for id in range(n, tokenizer.vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE[tokenizer.family],
        "tokenizer.ggml.tokens": to_alphabet(tokenizer.ranks) + names,
        "tokenizer.ggml.token_type": [NORMAL] * n + [CONTROL] * len(names),
        "tokenizer.ggml.bos_token_id": tokenizer.special.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.special.eos,
        "tokenizer.chat_template": "{{ bos_token }}",
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def piece_metadata(model: PieceModel, **more: Any) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a SentencePiece vocabulary."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(model.pieces),
        "tokenizer.ggml.scores": list(model.scores),
        "tokenizer.ggml.token_type": list(model.types),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def without(metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}


def test_byte_bpe_ids_equal_metas_file(family: str) -> None:
    native = opened(family)
    ours = tokenizer_from_gguf(byte_metadata(native))
    assert isinstance(ours, TiktokenTokenizer)
    assert ours.special == native.special
    assert ours.template == "{{ bos_token }}"
    assert [ours.encode(text) for text in MANY] == [native.encode(text) for text in MANY]


def test_written_and_read_by_the_gguf_package(tiny_pieces: bytes, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = PieceModel.parse(tiny_pieces)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece in model.pieces])
    writer.add_token_scores(list(model.scores))
    writer.add_token_types(list(model.types))
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    ours, native = tokenizer_from_gguf(metadata), SentencePieceTokenizer(model)
    assert [ours.encode(text) for text in MANY] == [native.encode(text) for text in MANY]


@pytest.mark.parametrize("types", [True, False])
def test_pieces_ids_equal_the_model_file(tiny_pieces: bytes, types: bool) -> None:
    model = PieceModel.parse(tiny_pieces)
    metadata = piece_metadata(model)
    ours = tokenizer_from_gguf(metadata if types else without(metadata, "token_type"))
    native = SentencePieceTokenizer(model)
    assert [ours.encode(text) for text in MANY] == [native.encode(text) for text in MANY]
    assert (ours.special, ours.family) == (native.special, "llama2")


def test_llama2_without_scores(llama2: SentencePieceTokenizer) -> None:
    flat = piece_metadata(llama2.model, scores=[-1000.0] * llama2.vocab_size)
    for metadata in (flat, without(flat, "scores")):
        with pytest.warns(TokenizerFilesWarning, match="no merge scores"):
            ours = tokenizer_from_gguf(metadata)
        assert [ours.encode(text) for text in MANY] == [llama2.encode(text) for text in MANY]


def test_code_llama_pieces_are_special_in_gguf_too(tiny_pieces: bytes) -> None:
    tokenizer = tokenizer_from_gguf(piece_metadata(with_infill_pieces(PieceModel.parse(tiny_pieces))))
    assert tokenizer.family == "codellama"
    assert not set(tokenizer.encode(" <PRE> <MID> <SUF> <EOT>")) & set(tokenizer.special.ids.values())


def test_unknown_or_absent_pre_of_a_released_vocabulary(family: str) -> None:
    metadata = byte_metadata(opened(family), pre="default")
    assert tokenizer_from_gguf(metadata).family == family
    assert tokenizer_from_gguf(without(metadata, "pre")).family == family
    assert tokenizer_from_gguf(without(metadata, "token_type")).special == opened(family).special


def tiny_metadata(**more: Any) -> dict[str, Any]:
    names = to_alphabet(bytes((b,)) for b in range(256))
    tokens = [*names, "he", "ll", "hell", *llama3_names(12)]
    types = [NORMAL] * 259 + [CONTROL] * 12
    merges = ["h e", "l l", "he ll"]
    base = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": types, "merges": merges}
    return {f"tokenizer.ggml.{key}": value for key, value in (base | more).items()}


def test_small_vocabulary() -> None:
    tokenizer = tokenizer_from_gguf(tiny_metadata())
    assert tokenizer.encode("hello", bos=True) == [259, 258, ord("o")]
    assert tokenizer.special.stop == {260, 267, 268}
    assert tokenizer_from_gguf(tiny_metadata(pre="other"), family="llama3").encode("hello") == tokenizer.encode("hello")


def test_padding_and_added_tokens() -> None:
    tokens = [*tiny_metadata()["tokenizer.ggml.tokens"], "<tool>", "[PAD272]"]
    types = [NORMAL] * 259 + [CONTROL] * 12 + [USER_DEFINED, UNUSED]
    tokenizer = tokenizer_from_gguf(tiny_metadata(tokens=tokens, token_type=types, eot_token_id=268, eom_token_id=9999))
    assert tokenizer.decode([271]) == "<tool>"
    assert tokenizer.special.get("[PAD272]") is None
    assert 9999 not in tokenizer.special.stop


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"tokens": []}, "tokens is missing or empty"),
        ({"tokens": "abc"}, "tokens is missing or empty"),
        ({"tokens": [1, 2]}, "not a string"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'.*family='llama3'"),
        ({"token_type": [1, 2, 3]}, "3 entries for 271 tokens"),
        ({"merges": ["l l", "h e", "he ll"]}, "not in rank order"),
        ({"merges": []}, "never forms token 256"),
    ],
)
def test_keys_that_do_not_fit_are_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(tiny_metadata(**more))


def test_no_keys_at_all() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.model is None"):
        tokenizer_from_gguf({})
    with pytest.raises(TokenizerError, match="tokens is missing"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "llama"})


def test_pieces_without_scores_are_refused(tiny_pieces: bytes) -> None:
    with pytest.raises(TokenizerError, match="merge order is unknown"):
        tokenizer_from_gguf(without(piece_metadata(PieceModel.parse(tiny_pieces)), "scores"))


def test_no_space_prefix(tiny_pieces: bytes) -> None:
    tokenizer = tokenizer_from_gguf(piece_metadata(PieceModel.parse(tiny_pieces), add_space_prefix=False))
    assert not tokenizer.piece(tokenizer.encode("the")[0]).startswith("▁")
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
