"""Opening folders and files: recognised by content, checked against each other, damage named."""

from __future__ import annotations

import base64
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herd.errors import CheckpointError, HerdError, TokenizerError
from herd.tokenizer import files, huggingface, settings
from herd.tokenizer.bytelevel import from_alphabet
from herd.tokenizer.files import TokenizerFilesWarning, load_tokenizer
from herd.tokenizer.pieces import PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.tiktoken import TiktokenTokenizer
from tests.tokenizer.conftest import model_path, opened
from tests.tokenizer.made import NAMES, hf_pieces, like_llama, small_json


@pytest.fixture
def llama3_folder(tmp_path: Path) -> Path:
    """A folder with Meta's tokenizer.model of Llama 3."""
    shutil.copy(model_path("llama3"), tmp_path / "tokenizer.model")
    return tmp_path


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


# -- what is found


def test_model_files_are_told_apart_by_content(tiny_pieces: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_pieces)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    shutil.copy(model_path("llama4"), tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, TiktokenTokenizer)
    assert tokenizer.family == "llama4"


def test_original_folder_is_searched(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    shutil.copy(model_path("llama3"), tmp_path / "original" / "tokenizer.model")
    assert load_tokenizer(tmp_path).family == "llama3"


def test_piece_folder_agrees_silently(tiny_pieces: bytes, tmp_path: Path) -> None:
    model = like_llama(PieceModel.parse(tiny_pieces))
    (tmp_path / "tokenizer.model").write_bytes(model.serialize())
    write(tmp_path, "tokenizer.json", hf_pieces(model, legacy=True))
    assert load_tokenizer(tmp_path).vocab_size == len(model.pieces)


# -- what the files beside it say


def test_settings(llama3_folder: Path) -> None:
    added = {"128256": {"content": "<|im_end|>", "special": True}, "128257": {"content": "<t>", "special": False}}
    config = {"chat_template": "config", "eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": added}
    write(llama3_folder, "tokenizer_config.json", config | {"chat_format": "llama3.1"})
    write(llama3_folder, "generation_config.json", {"eos_token_id": [128009, 7]})
    tokenizer = load_tokenizer(llama3_folder)
    assert (tokenizer.template, tokenizer.chat_format) == ("config", "llama3.1")
    assert tokenizer.special.stop == {128001, 128008, 128009, 128256, 7}
    assert tokenizer.vocab_size == 128_258
    assert tokenizer.decode([128256, 128257]) == "<t>"


def test_template_files_come_before_the_config(llama3_folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    write(llama3_folder, "tokenizer_config.json", {"chat_template": named})
    assert load_tokenizer(llama3_folder).template == "named"
    write(llama3_folder, "chat_template.json", {"chat_template": "own json"})
    assert load_tokenizer(llama3_folder).template == "own json"
    write(llama3_folder, "chat_template.jinja", "own jinja {{ '🙂' }}")
    assert load_tokenizer(llama3_folder).template == "own jinja {{ '🙂' }}"


def test_without_other_files(llama3_folder: Path) -> None:
    tokenizer = load_tokenizer(llama3_folder)
    assert (tokenizer.template, tokenizer.chat_format) == (None, None)
    assert tokenizer.special == opened("llama3").special


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is"),
        ("generation_config.json", {"eos_token_id": [-1]}, "eos_token_id is"),
        ("generation_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "broken entry 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "y"}}, "broken entry '5'"),
        ("tokenizer_config.json", "{", "broken JSON"),
    ],
)
def test_broken_settings_are_named(llama3_folder: Path, name: str, content: object, message: str) -> None:
    write(llama3_folder, name, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(llama3_folder)
    assert name in str(caught.value)


def test_template_that_is_not_utf8(llama3_folder: Path) -> None:
    (llama3_folder / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match="byte 2: is not UTF-8"):
        load_tokenizer(llama3_folder)


# -- files that disagree


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """A folder with a small vocabulary in Meta's format and its special tokens in tokenizer_config.json."""
    vocab = small_json()["model"]["vocab"]
    ranks = from_alphabet(sorted(vocab, key=vocab.__getitem__))
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    added = {str(len(ranks) + i): {"content": name, "special": True} for i, name in enumerate(NAMES)}
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    return tmp_path


def test_small_folder_agrees_silently(small_folder: Path) -> None:
    write(small_folder, "tokenizer.json", small_json())
    assert load_tokenizer(small_folder, family="llama3").vocab_size == 604


def swap(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    single = [name for name in vocab if len(name) == 1]
    vocab[single[0]], vocab[single[1]] = vocab[single[1]], vocab[single[0]]


def shorten(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    del vocab[last]
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != last]


def merging(content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, r"tokenizer\.json disagrees with .*tokenizer\.model: id \d+ is b"),
        (shorten, "disagrees with .*: it has 599 ranks, not 600"),
        (merging, "ignore_merges is not true"),
    ],
)
def test_disagreement_is_reported_and_the_model_file_wins(
    small_folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    expected = load_tokenizer(small_folder, family="llama3").encode("hello world")
    content = copy.deepcopy(small_json())
    change(content)
    write(small_folder, "tokenizer.json", content)
    with pytest.warns(TokenizerFilesWarning, match=message) as caught:
        tokenizer = load_tokenizer(small_folder, family="llama3")
    assert str(caught[0].message).endswith(f"Using {small_folder / 'tokenizer.model'}")
    assert tokenizer.encode("hello world") == expected


def test_disagreeing_pieces(tiny_pieces: bytes, tmp_path: Path) -> None:
    model = like_llama(PieceModel.parse(tiny_pieces))
    write(tmp_path, "tokenizer.json", hf_pieces(model, legacy=True))

    def changed(**parts: object) -> bytes:
        lists = {"pieces": model.pieces, "scores": model.scores, "types": model.types}
        return PieceModel(**(lists | parts)).serialize()  # type: ignore[arg-type]

    swapped = [*model.pieces[:-1], "zzzz"]
    cases = {
        changed(scores=[-score for score in model.scores]): "merges in another order",
        changed(pieces=swapped): f"id {len(swapped) - 1} is ",
        changed(dummy_prefix=False): "it puts a space before the text",
        model.with_added([("<x>", len(model.pieces))]).serialize(): "pieces, not",
    }
    for data, message in cases.items():
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.warns(TokenizerFilesWarning, match=message):
            load_tokenizer(tmp_path)


def test_damaged_second_file_is_reported(llama3_folder: Path) -> None:
    write(llama3_folder, "tokenizer.json", "{")
    with pytest.warns(TokenizerFilesWarning, match=r"tokenizer.json.*broken JSON.*Using .*tokenizer.model"):
        load_tokenizer(llama3_folder)


def test_renamed_special_token_is_reported(llama3_folder: Path) -> None:
    write(llama3_folder, "tokenizer_config.json", {"added_tokens_decoder": {"128010": {"content": "<|eot_id|>"}}})
    with pytest.warns(TokenizerFilesWarning, match="the id 128010, tokenizer.model gives it 128009"):
        assert load_tokenizer(llama3_folder).special.get("<|eot_id|>") == 128009


# -- files that are not tokenizers


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_tokenizer(tmp_path / "nothing.model")
    with pytest.raises(CheckpointError, match=r"no tokenizer.model, original/tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match="holds a GGUF file, open that"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "line 1"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a SentencePiece model"),
        (bytes(range(256)) * 40, "not a SentencePiece model|cut off"),
        (b"AA== 0\nAQ== 1\n", "2 of the 256 single bytes"),
        ("é 0\n".encode() * 20, "not a SentencePiece model|cut off"),
    ],
)
def test_not_a_tokenizer(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(HerdError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_truncated_released_file(tmp_path: Path) -> None:
    lines = model_path("llama3").read_bytes().splitlines(keepends=True)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(lines[:100_000]))
    with pytest.raises(CheckpointError, match=r"100,000 ranks; Llama 3 has 128,000.*cut off"):
        load_tokenizer(path)
    with pytest.raises(TokenizerError, match="no list of special tokens"):
        load_tokenizer(path, family="llama3")


def test_another_size_with_a_list_of_specials(tmp_path: Path) -> None:
    lines = model_path("llama3").read_bytes().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:1_000]))
    added = {"1000": {"content": "<|begin_of_text|>"}, "1001": {"content": "<|eot_id|>"}}
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    tokenizer = load_tokenizer(tmp_path, family="llama3")
    assert (tokenizer.vocab_size, tokenizer.special.stop) == (1002, {1001})


def test_huge_files_are_refused_unread(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_MODEL", 1000)
    with pytest.raises(CheckpointError, match="at most 1,000"):
        load_tokenizer(small_folder)
    (small_folder / "tokenizer.model").unlink()
    write(small_folder, "tokenizer.json", small_json())
    monkeypatch.setattr(huggingface, "MAX_JSON", 1001)
    with pytest.raises(CheckpointError, match="at most 1,001"):
        load_tokenizer(small_folder)
    monkeypatch.setattr(huggingface, "MAX_JSON", 10**9)
    monkeypatch.setattr(settings, "MAX_JSON", 10)
    with pytest.raises(CheckpointError, match="at most 10"):
        load_tokenizer(small_folder)


def test_folder_where_a_file_belongs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)
