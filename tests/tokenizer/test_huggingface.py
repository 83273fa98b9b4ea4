"""tokenizer.json: the ids of Meta's files and of the tokenizers package, and the name of every rule that is not Llama's."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herd.errors import CheckpointError, TokenizerError
from herd.tokenizer.files import TokenizerFilesWarning, load_tokenizer
from herd.tokenizer.huggingface import open_tokenizer_json, read_tokenizer_json
from herd.tokenizer.pieces import PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from tests.tokenizer import texts
from tests.tokenizer.conftest import model_path, opened
from tests.tokenizer.made import NAMES, hf_pieces, like_llama, small_json

MANY = texts.ALL + texts.generate(4_000, seed=12)
MORE = pytest.param(texts.ALL + texts.generate(20_000, seed=12), marks=pytest.mark.slow, id="more")


@pytest.fixture
def small() -> dict[str, Any]:
    """A byte-level tokenizer.json of 600 ranks."""
    return small_json()


# -- byte level


def build(content: dict[str, Any], folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(folder)


FAMILIES = ["llama3", pytest.param("llama4", marks=pytest.mark.slow)]
"""Llama 4's tokenizer.json is held to the tokenizers package in write/test_huggingface.py."""


@pytest.mark.parametrize("many", [pytest.param(MANY, id="many"), MORE])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_metas_file_and_tokenizers(family: str, hf_folder: Callable[[str], Path], many: list[str]) -> None:
    from tokenizers import Tokenizer

    path = hf_folder(family) / "tokenizer.json"
    ours, native, theirs = load_tokenizer(path), opened(family), Tokenizer.from_file(str(path))
    assert isinstance(ours, TiktokenTokenizer)
    assert list(ours.ranks) == list(native.ranks)
    assert ours.special == native.special
    theirs.encode_special_tokens = True  # else it makes special ids from user text
    for text, encoded in zip(many, theirs.encode_batch_fast(many, add_special_tokens=False), strict=True):
        assert ours.encode(text) == encoded.ids, text


@pytest.mark.parametrize("family", FAMILIES)
def test_merges_are_left_out_only_when_the_ranks_are_metas(family: str, hf_folder: Callable[[str], Path]) -> None:
    path = hf_folder(family) / "tokenizer.json"
    quick = open_tokenizer_json(path)
    slow = read_tokenizer_json(json.loads(path.read_text(encoding="utf-8")))
    assert quick == slow


@pytest.mark.parametrize("family", FAMILIES)
def test_released_folders_agree_silently(family: str, hf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(hf_folder(family), tmp_path, dirs_exist_ok=True)
    (tmp_path / "original").mkdir()
    shutil.copy(model_path(family), tmp_path / "original" / "tokenizer.model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(tmp_path).special.ids == opened(family).special.ids


def test_two_generations_in_one_folder(hf_folder: Callable[[str], Path], tiny_pieces: bytes, tmp_path: Path) -> None:
    shutil.copy(model_path("llama4"), tmp_path / "tokenizer.model")
    shutil.copy(hf_folder("llama3") / "tokenizer.json", tmp_path)
    with pytest.warns(TokenizerFilesWarning, match="cuts text as llama3, not as llama4"):
        assert load_tokenizer(tmp_path).family == "llama4"
    (tmp_path / "tokenizer.model").write_bytes(tiny_pieces)
    with pytest.warns(TokenizerFilesWarning, match="byte-BPE vocabulary, the other a SentencePiece one"):
        assert load_tokenizer(tmp_path).family == "llama2"


def test_small_vocabulary_equals_tokenizers(small: dict[str, Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    ours, theirs = build(small, tmp_path), Tokenizer.from_str(json.dumps(small))
    theirs.encode_special_tokens = True
    for text, encoded in zip(MANY, theirs.encode_batch_fast(MANY, add_special_tokens=False), strict=True):
        assert ours.encode(text) == encoded.ids, text
    assert ours.vocab_size == 604
    assert ours.special.ids == {name: 600 + i for i, name in enumerate(NAMES)}


def test_merges_as_strings_are_read_too(small: dict[str, Any], tmp_path: Path) -> None:
    older = copy.deepcopy(small)
    older["model"]["merges"] = [" ".join(pair) for pair in older["model"]["merges"]]
    assert build(older, tmp_path).encode("hello world") == build(small, tmp_path).encode("hello world")


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one field changed; numbers in the path are list positions."""
    content = copy.deepcopy(content)
    at: Any = content
    *steps, last = [int(step) if step.isdecimal() else step for step in path.split("/")]
    for step in steps:
        at = at[step]
    at[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", None, "model is missing"),
        ("model/type", "Unigram", "model.type is 'Unigram'"),
        ("model/ignore_merges", False, "model.ignore_merges is not true"),
        ("model/byte_fallback", True, "byte_fallback is true in a byte-level"),
        ("model/dropout", 0.1, "model.dropout is 0.1"),
        ("model/continuing_subword_prefix", "##", "continuing_subword_prefix"),
        ("model/end_of_word_suffix", "</w>", "end_of_word_suffix"),
        ("model/vocab", [], "vocab is missing"),
        ("model/vocab/!", "0", "not integers"),
        ("model/vocab/!", 9999, "no single token with id"),
        ("model/vocab/a b", 600, "byte-level alphabet|no single token"),
        ("normalizer", {"type": "NFC"}, "normalizer is 'NFC'"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}, "normalizer is 'Lowercase'"),
        ("normalizer", {"type": "Sequence"}, "normalizer.normalizers is not a list"),
        ("pre_tokenizer", None, "neither a ByteLevel"),
        ("pre_tokenizer", [], "pre_tokenizer is not an object"),
        ("pre_tokenizer/pretokenizers/0/type", "Digits", "pre_tokenizer is Digits \\+ ByteLevel"),
        ("pre_tokenizer/pretokenizers/0/behavior", "Removed", "not 'Isolated'"),
        ("pre_tokenizer/pretokenizers/0/invert", True, "not 'Isolated'"),
        ("pre_tokenizer/pretokenizers/0/pattern", {"Regex": "\\s+"}, "neither Llama 3's nor Llama 4's"),
        ("pre_tokenizer/pretokenizers/1/add_prefix_space", True, "add_prefix_space and use_regex"),
        ("pre_tokenizer/pretokenizers/1/use_regex", True, "add_prefix_space and use_regex"),
        ("added_tokens", [{"id": "x", "content": "y"}], "entry without content and id"),
        ("added_tokens", 7, "added_tokens is not a list"),
        ("added_tokens", [], "no list of special tokens"),
        ("model/merges/0", ["a", "b", "c"], "which is not a pair"),
        ("model/merges/0", ["zz", "qq"], "to a token that is not in the vocabulary"),
    ],
)
def test_other_rules_are_named(small: dict[str, Any], tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        build(changed(small, path, value), tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_merges_that_are_not_by_rank(small: dict[str, Any], tmp_path: Path) -> None:
    merges = small["model"]["merges"]
    with pytest.raises(TokenizerError, match="not in rank order: entry 1 "):
        build(changed(small, "model/merges", [merges[1], merges[0], *merges[2:]]), tmp_path)
    with pytest.raises(TokenizerError, match="never forms token"):
        build(changed(small, "model/merges", merges[1:]), tmp_path)


def test_family_override_cuts_an_unknown_regex(small: dict[str, Any], tmp_path: Path) -> None:
    odd = changed(small, "pre_tokenizer/pretokenizers/0/pattern", {"Regex": "\\w+"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(odd))
    assert load_tokenizer(tmp_path, family="llama3").encode("it's") == build(small, tmp_path).encode("it's")


def test_added_tokens_are_tolerated(small: dict[str, Any], tmp_path: Path) -> None:
    more = copy.deepcopy(small)
    more["added_tokens"] += [
        {"id": 604, "content": "<tool>", "special": False},
        {"id": 700, "content": "<x>", "special": True},
    ]
    tokenizer = build(more, tmp_path)
    assert tokenizer.vocab_size == 701
    assert tokenizer.encode("<tool><x>", allow_special=True) == [604, 700]
    assert not {604, 700} & set(tokenizer.encode("<tool><x>"))
    assert tokenizer.decode([604, 700]) == "<tool>"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "line 1: broken JSON"),
        (b'{"model": {\n"vocab": {"a": 0,}}}', "line 2: broken JSON"),
        (b'{"model": "\xff"}', "is not UTF-8"),
        (b"{" + b'"a":[' * 100_000, "broken JSON"),
        (b'{"model": {"vocab": {"a": ' + b"9" * 5000 + b"}}}", "broken JSON"),
    ],
)
def test_broken_json_is_located(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_truncation_is_noticed(small: dict[str, Any], tmp_path: Path) -> None:
    data = json.dumps(small).encode()
    for size in (len(data) - 1, len(data) // 2, len(data) - 40):
        (tmp_path / "tokenizer.json").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="broken JSON"):
            load_tokenizer(tmp_path)


# -- pieces


@pytest.mark.parametrize("legacy", [True, False])
def test_pieces_give_the_ids_of_the_model_file(tiny_pieces: bytes, tmp_path: Path, legacy: bool) -> None:
    model = like_llama(PieceModel.parse(tiny_pieces))
    ours, native = build(hf_pieces(model, legacy=legacy), tmp_path), SentencePieceTokenizer(model)
    for text in MANY:
        assert ours.encode(text) == native.encode(text), text
    assert (ours.special, ours.family) == (native.special, "llama2")


def test_pieces_equal_tokenizers(tiny_pieces: bytes, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    content = hf_pieces(like_llama(PieceModel.parse(tiny_pieces)), legacy=True)
    ours, theirs = build(content, tmp_path), Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    many = [text for text in MANY if text]  # tokenizers gives no ids for "" either, but warns
    for text, encoded in zip(many, theirs.encode_batch_fast(many, add_special_tokens=False), strict=True):
        assert ours.encode(text) == encoded.ids, text


def test_llama2_from_tokenizer_json(llama2: SentencePieceTokenizer, llama2_path: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    content = hf_pieces(PieceModel.parse(llama2_path.read_bytes()), legacy=True)
    ours, theirs = build(content, tmp_path), Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    many = [text for text in MANY if text]
    for text, encoded in zip(many, theirs.encode_batch_fast(many, add_special_tokens=False), strict=True):
        assert ours.encode(text) == llama2.encode(text) == encoded.ids, text


def test_llama2_with_merges_in_another_order_is_put_right(
    llama2: SentencePieceTokenizer, llama2_path: Path, tmp_path: Path
) -> None:
    content = hf_pieces(PieceModel.parse(llama2_path.read_bytes()), legacy=False, by_id=True)
    with pytest.warns(TokenizerFilesWarning, match="not in Llama 2's order"):
        ours = build(content, tmp_path)
    for text in MANY[:3_000]:
        assert ours.encode(text) == llama2.encode(text), text


def test_added_tokens_beyond_the_pieces(tiny_pieces: bytes, tmp_path: Path) -> None:
    content = hf_pieces(like_llama(PieceModel.parse(tiny_pieces)), legacy=True)
    n = len(content["model"]["vocab"])
    content["added_tokens"] += [
        {"id": n, "content": "<pad>", "special": True},
        {"id": n + 1, "content": "<t>", "special": False},
    ]
    tokenizer = build(content, tmp_path)
    assert tokenizer.vocab_size == n + 2
    assert tokenizer.special.get("<pad>") == n
    assert tokenizer.encode("<pad><t>", allow_special=True) == [n, n + 1]
    assert not {n, n + 1} & set(tokenizer.encode("<pad><t>"))
    assert tokenizer.decode([n, n + 1]) == "<t>"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model/byte_fallback", False, "neither a ByteLevel"),
        ("model/ignore_merges", True, "ignore_merges is true"),
        ("model/merges", [], "model.merges lists 0 of the"),
        ("model/merges/0", ["zz", "qq"], "not all three are in the vocabulary"),
        ("model/vocab/<s>", 5000, "gap or a double id"),
        ("normalizer", None, "do not write spaces as Llama"),
        ("normalizer", {"type": "NFKC"}, "do not write spaces as Llama"),
        ("pre_tokenizer", {"type": "Whitespace"}, "do not write spaces as Llama"),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "split": True}, "do not write spaces as Llama"),
    ],
)
def test_other_rules_of_pieces_are_named(
    tiny_pieces: bytes, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    content = hf_pieces(like_llama(PieceModel.parse(tiny_pieces)), legacy=True)
    with pytest.raises(TokenizerError, match=message):
        build(changed(content, path, value), tmp_path)


def test_merges_that_no_scores_reproduce(tiny_pieces: bytes, tmp_path: Path) -> None:
    content = hf_pieces(like_llama(PieceModel.parse(tiny_pieces)), legacy=True)
    merges = content["model"]["merges"]
    at = next(i for i in range(len(merges)) if "".join(merges[i]) == "".join(merges[i + 1]))
    moved = [*merges[: at + 1], *merges[at + 2 : at + 12], merges[at + 1], *merges[at + 12 :]]
    with pytest.raises(TokenizerError, match="no order of scores merges that way"):
        build(changed(content, "model/merges", moved), tmp_path)


@pytest.mark.parametrize(("normalizer", "prefix"), [("both", True), ("replace", False)])
def test_dummy_prefix_is_read_from_the_normalizer(
    tiny_pieces: bytes, tmp_path: Path, normalizer: str, prefix: bool
) -> None:
    content = hf_pieces(like_llama(PieceModel.parse(tiny_pieces)), legacy=True)
    if normalizer == "replace":
        content = changed(content, "normalizer", content["normalizer"]["normalizers"][1])
    tokenizer = build(content, tmp_path)
    assert tokenizer.piece(tokenizer.encode("the")[0]).startswith("▁") is prefix
    assert tokenizer.decode(tokenizer.encode(" x")) == " x"
