"""A tokenizer written in one form, opened, written in another and opened again is still the same tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from herd.errors import TokenizerError
from herd.tokenizer.pieces import PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.write import gguf_fields, hf_files, meta_file
from tests.tokenizer.conftest import meta, model_path
from tests.tokenizer.write.conftest import FORMS, LARGE, MANY, SMALL, TEMPLATE, metas_names, original, reopened

QUICK = {("llama2", "json"), ("llama2", "meta"), ("llama2", "gguf"), ("codellama", "gguf")}
QUICK |= {("llama3", "json"), ("llama3", "meta"), ("llama3", "gguf")}
"""Every form of each kind of vocabulary; Code Llama's as json is held to the tokenizers package (test_huggingface.py)."""


def check_same(ours: Any, other: Any, texts: list[str]) -> None:
    assert (other.family, other.vocab_size) == (ours.family, ours.vocab_size)
    assert other.special == ours.special
    assert [other.is_text(id) for id in ours.special.ids.values()] == [
        ours.is_text(id) for id in ours.special.ids.values()
    ]
    for text in texts:
        ids = ours.encode(text, bos=True)
        assert other.encode(text, bos=True) == ids, text
        assert other.decode(ids) == ours.decode(ids), text


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_two_forms_in_a_row(name: str, first: str, second: str, tmp_path: Path) -> None:
    if "meta" in (first, second) and not metas_names(name):
        pytest.skip("Meta's format cannot hold these special tokens: see test_other_special_tokens_are_refused")
    if "meta" in (first, second) and name == "tiny-added":
        pytest.skip("checked below: a tokenizer.model alone does not say which tokens are special")
    ours = original(name)
    middle = reopened(ours, first, tmp_path / "first")
    check_same(ours, reopened(middle, second, tmp_path / "second"), MANY[::20])


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (name, form) in QUICK else pytest.mark.slow)
        for name in LARGE
        for form in FORMS
    ],
)
def test_real_vocabularies_in_every_form(name: str, form: str, tmp_path: Path) -> None:
    if form == "meta" and not metas_names(name):
        pytest.skip("Meta's format cannot hold these special tokens: see test_other_special_tokens_are_refused")
    check_same(original(name), reopened(original(name), form, tmp_path), MANY)


@pytest.mark.slow
@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("name", LARGE)
def test_real_vocabularies_in_two_forms(name: str, first: str, second: str, tmp_path: Path) -> None:
    if "meta" in (first, second) and not metas_names(name):
        pytest.skip("Meta's format cannot hold these special tokens")
    middle = reopened(original(name), first, tmp_path / "first")
    check_same(original(name), reopened(middle, second, tmp_path / "second"), MANY)


def test_template_and_format_travel(tmp_path: Path) -> None:
    for form in ("hf", "gguf"):
        tokenizer = reopened(original("nano"), "hf", tmp_path / form)
        tokenizer.template = TEMPLATE
        again = reopened(tokenizer, form, tmp_path / (form + "2"))
        assert again.template == TEMPLATE
    assert reopened(original("tiny-infill"), "hf", tmp_path / "c").chat_format == "codellama70b"


# -- Meta's file


@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_metas_files_come_back_byte_for_byte(family: str) -> None:
    assert meta_file(original(family)) == model_path(family).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "gguf"])
@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_metas_files_come_back_from_other_forms(family: str, form: str, tmp_path: Path) -> None:
    assert meta_file(reopened(original(family), form, tmp_path)) == model_path(family).read_bytes()


def test_llama2_comes_back_byte_for_byte(llama2_path: Path, tmp_path: Path) -> None:
    data = llama2_path.read_bytes()
    assert meta_file(original("llama2")) == data
    assert hf_files(original("llama2"))["tokenizer.model"] == data
    assert meta_file(reopened(original("llama2"), "hf", tmp_path)) == data


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_metas_code_reads_it(family: str, tmp_path: Path) -> None:
    module = type(meta(family))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(meta_file(reopened(original(family), "gguf", tmp_path)))
    theirs = module(path)
    for text in MANY[::3]:
        assert theirs.encode(text, bos=True, eos=False) == original(family).encode(text, bos=True), text


@pytest.mark.parametrize("name", ["tiny", "tiny-no-prefix", "llama2"])
@pytest.mark.parametrize("form", ["json", "gguf"])
def test_the_sentencepiece_package_reads_it(name: str, form: str, tmp_path: Path) -> None:
    """From a form without the original bytes, so that the file is written from pieces and scores."""
    ours = original(name)
    written = meta_file(reopened(ours, form, tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=written)
    assert (theirs.unk_id(), theirs.bos_id(), theirs.eos_id(), theirs.pad_id()) == (0, 1, 2, -1)
    for text in MANY:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


def test_infill_pieces_are_still_found_by_name(tmp_path: Path) -> None:
    ours = original("codellama")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=meta_file(reopened(ours, "gguf", tmp_path)))
    assert [theirs.piece_to_id(p) for p in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")] == [32007, 32008, 32009, 32010]
    for text in ("x <PRE> y", "☺def f():", " <EOT>"):
        assert theirs.encode(text) == ours.encode(text), text


def test_added_pieces_are_in_the_file() -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=meta_file(original("tiny-added")))
    assert [theirs.piece_to_id(p) for p in ("<pad>", "<tool>", "<|x|>")] == [900, 901, 902]
    assert theirs.is_control(900)
    assert not theirs.is_control(901)
    again = SentencePieceTokenizer(PieceModel.parse(meta_file(original("tiny-added"))))
    assert again.special == original("tiny-added").special
    assert again.decode([901]) == "<tool>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nano", "32 special tokens, not 256"),
        ("renamed", "33 special tokens, not 256"),
        ("llama3.2-vision", "257 special tokens, not 256"),
    ],
)
def test_other_special_tokens_are_refused(name: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        meta_file(original(name))
    lines = meta_file(original(name), any_special=True).splitlines()
    assert len(lines) == len(original(name).ranks)


# -- GGUF


def test_rows_without_a_token_are_unused() -> None:
    for name in ("nano", "tiny"):
        size = original(name).vocab_size
        fields = gguf_fields(original(name), rows=size + 3)
        assert fields["tokenizer.ggml.tokens"][size:] == [f"[PAD{size + i}]" for i in range(3)]
        assert fields["tokenizer.ggml.token_type"][size:] == [5, 5, 5]
        with pytest.raises(TokenizerError, match=f"has {size} tokens, the model only {size - 1} embedding rows"):
            gguf_fields(original(name), rows=size - 1)


@pytest.mark.parametrize("name", ["nano", "tiny", "tiny-infill"])
def test_unused_rows_are_no_tokens_when_read(name: str, tmp_path: Path) -> None:
    from herd.tokenizer.gguf import tokenizer_from_gguf

    ours = original(name)
    again = tokenizer_from_gguf(gguf_fields(ours, rows=ours.vocab_size + 5))
    check_same(ours, again, MANY[::20])


def test_fields_of_each_kind() -> None:
    fields = gguf_fields(original("nano"), TEMPLATE)
    ids = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items() if type(v) in (int, bool, str)}
    assert ids == {
        "model": "gpt2",
        "pre": "llama-bpe",
        "bos_token_id": 4064,
        "eos_token_id": 4073,
        "eot_token_id": 4073,
        "eom_token_id": 4072,
        "padding_token_id": 4068,
        "add_bos_token": True,
        "add_eos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    fields = gguf_fields(original("tiny"))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.unknown_token_id"] == 0
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert gguf_fields(original("tiny-no-prefix"))["tokenizer.ggml.add_space_prefix"] is False
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_infill_ids_have_keys() -> None:
    fields = gguf_fields(original("codellama"))
    keys = ("prefix", "suffix", "middle", "eot", "fim_pre", "fim_suf", "fim_mid")
    found = [fields[f"tokenizer.ggml.{key}_token_id"] for key in keys]
    assert found == [32007, 32008, 32009, 32010, 32007, 32008, 32009]
    with pytest.warns(UserWarning, match="16 infill tokens have no embedding rows"):
        fields = gguf_fields(original("codellama"), rows=32000)
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.scores"]) == 32000
    assert "tokenizer.ggml.prefix_token_id" not in fields
    assert "tokenizer.ggml.eot_token_id" not in fields
