"""Written Hugging Face files against transformers and tokenizers: same ids, same text, same special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herd.errors import TokenizerError
from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.pieces import NORMAL, UNUSED, PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import with_added, with_stop
from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.tokenizer import SpecialTokens
from herd.tokenizer.write import hf_files, meta_file
from herd.tokenizer.write.mergelist import merges_of_pieces
from herd.tokenizer.write.names import added_tokens, own_stops, turn_end
from tests import vocabularies
from tests.tokenizer.write.conftest import MANY, SMALL, SOME, TEMPLATE, original, reopened

FolderOf = Callable[[str], Path]


@pytest.mark.parametrize("name", [*SMALL, *SOME[:3], "llama4"])
def test_ids_and_text_equal_theirs(name: str, folder_of: FolderOf, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    ours, theirs = original(name), Tokenizer.from_file(str(folder_of(name) / "tokenizer.json"))
    theirs.encode_special_tokens = True  # else it makes special ids from user text
    texts = [text for text in MANY if text]
    visible = [t for t in ("<tool>",) if t in ours.special.ids]  # which the package finds in any text
    texts = [text for text in texts if not any(t in text for t in visible)]
    (tmp_path / "tokenizer.json").write_bytes((folder_of(name) / "tokenizer.json").read_bytes())
    again = load_tokenizer(tmp_path)
    assert again.special.ids == ours.special.ids
    for text, encoded in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = ours.encode(text)
        assert ids == encoded.ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    assert [again.encode(text) for text in texts[::5]] == [ours.encode(text) for text in texts[::5]]


@pytest.mark.parametrize("name", [*SMALL, *SOME])
def test_transformers_opens_the_folder(name: str, folder_of: FolderOf) -> None:
    from transformers import AutoTokenizer

    ours, theirs = original(name), AutoTokenizer.from_pretrained(folder_of(name))
    special = ours.special
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.pad_token_id) == (special.bos, special.pad)
    assert theirs.eos_token_id in special.stop
    assert theirs.chat_template == TEMPLATE
    assert theirs.model_max_length == 4096
    listed = {id: (token.content, token.special) for id, token in theirs.added_tokens_decoder.items()}
    assert sorted(listed) == sorted(special.ids.values())
    for spelled, id in special.ids.items():
        assert listed[id] == (spelled, id == special.unk or not ours.is_text(id))
    for text in MANY[::5]:
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text, bos=True), text
    names = [name for name in special.ids if name != "<unk>"]
    for start in range(0, len(names), 500):  # Meta's limit cuts longer runs, inside a name too
        turn = "".join(names[start : start + 500])
        ids = theirs(turn, add_special_tokens=False)["input_ids"]
        assert ids == [special.ids[name] for name in names[start : start + 500]]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_content_is_what_their_converter_writes(family: str, folder_of: FolderOf, hf_folder: FolderOf) -> None:
    written, theirs = (json.loads((at(family) / "tokenizer.json").read_bytes()) for at in (folder_of, hf_folder))
    assert written["model"].keys() == theirs["model"].keys()
    for key in ("vocab", "merges", "ignore_merges", "byte_fallback"):
        assert written["model"][key] == theirs["model"][key], key
    assert written["pre_tokenizer"] == theirs["pre_tokenizer"]
    count = len(theirs["added_tokens"])  # their converter stops before Llama 4's reasoning tokens
    assert written["added_tokens"][:count] == theirs["added_tokens"]


def test_chat_and_base_models_end_differently(folder_of: FolderOf) -> None:
    def ends(*args: Any) -> str:
        return json.loads(hf_files(*args)["tokenizer_config.json"])["eos_token"]

    config = json.loads((folder_of("llama3") / "tokenizer_config.json").read_bytes())
    assert config["eos_token"] == "<|eot_id|>"
    assert ends(original("renamed")) == "<|eot_id|>"  # it says chat_format
    original("renamed").chat_format = None
    assert ends(original("renamed")) == "<|end_of_text|>"
    original("renamed").chat_format = "llama3"
    assert ends(original("tiny"), TEMPLATE) == "</s>"


def test_files_of_each_kind() -> None:
    assert set(hf_files(original("tiny"))) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
    }
    assert "tokenizer.model" not in hf_files(original("nano"))
    assert hf_files(original("nano"), TEMPLATE)["chat_template.jinja"] == TEMPLATE.encode()


def test_names_that_a_checkpoint_gave_are_kept() -> None:
    """A fine-tune of Llama 3 that named two reserved ids, beside Meta's vocabulary file."""
    listed = {128002: "<|im_start|>", 128003: "<|im_end|>", 128005: "<|reserved_special_token_2|>"}
    base = original("llama3")
    special = with_stop(with_added(base.special, {name: id for id, name in listed.items()}), [128003])
    tokenizer = TiktokenTokenizer(base.ranks, "llama3", special)
    names = {entry.id: entry.name for entry in added_tokens(tokenizer)}
    assert (names[128002], names[128003]) == ("<|im_start|>", "<|im_end|>")
    assert names[128005] == "<|step_id|>"  # another numbering of the reserved names is not a name
    assert turn_end(tokenizer, chat=True) == 128003
    assert own_stops(tokenizer) == [128003]
    with pytest.raises(TokenizerError, match=r"id 128002 is <\|im_start\|> here"):
        meta_file(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_names_that_a_checkpoint_gave_are_read_again(form: str, tmp_path: Path) -> None:
    base = original("llama3")
    special = with_stop(with_added(base.special, {"<|im_start|>": 128002, "<|im_end|>": 128003}), [128003])
    tokenizer = TiktokenTokenizer(base.ranks, "llama3", special)
    assert reopened(tokenizer, form, tmp_path).special == special


def test_gap_between_ids_is_refused() -> None:
    nano = original("nano")
    ids = {**nano.special.ids, "<far>": 5000}
    special = SpecialTokens(bos=4064, eos=4065, stop=frozenset([4065]), ids=ids)
    tokenizer = TiktokenTokenizer(nano.ranks, "llama3", special)
    with pytest.raises(TokenizerError, match="id 4096 has no token, but <far> has id 5000"):
        hf_files(tokenizer)


def test_pieces_that_no_merge_list_forms_are_refused() -> None:
    model = PieceModel.parse(vocabularies.trained_pieces())
    odd = PieceModel(pieces=[*model.pieces, "a\U0001f999"], scores=[*model.scores, -5.0], types=[*model.types, NORMAL])
    with pytest.raises(TokenizerError, match="is not a piece itself"):
        merges_of_pieces(odd)
    types = list(model.types)
    types[next(i for i, piece in enumerate(model.pieces) if len(piece) == 2 and types[i] == NORMAL)] = UNUSED
    with pytest.raises(TokenizerError, match="is unused but merges"):
        hf_files(SentencePieceTokenizer(model.with_types(types)))


def test_something_without_a_vocabulary_is_refused() -> None:
    from herd.checkpoint.vocabulary import MissingTokenizer

    with pytest.raises(TokenizerError, match="MissingTokenizer has no vocabulary"):
        hf_files(MissingTokenizer(Path("x")))  # type: ignore[arg-type]
