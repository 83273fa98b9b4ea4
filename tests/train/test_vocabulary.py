import json

import pytest

from herd.errors import ConfigError
from herd.train.vocabulary import special_names, train_vocabulary, write_tokenizer

pytest.importorskip("tokenizers")
WORDS = [
    "the",
    "dog",
    "ran",
    "to",
    "the",
    "cat",
    "and",
    "the",
    "cat",
    "ran",
    "to",
    "the",
    "dog",
    "over",
    "a",
    "hill",
    "with",
    "many",
    "more",
    "words",
]
TEXTS = [f"{a} {b} {c}, said {a} {c} {b}!\n\n" for a in WORDS for b in WORDS for c in WORDS]


@pytest.fixture(scope="module")
def trained():
    return train_vocabulary(TEXTS, 320)


def test_bytes_come_first_and_specials_last_in_order(trained):
    assert trained.get_vocab_size() == 320
    assert [trained.id_to_token(288 + i) for i in range(32)] == list(special_names(32))
    assert trained.token_to_id("<|eot_id|>") == 288 + 9
    model = json.loads(trained.to_str())["model"]
    assert model["ignore_merges"] is True
    assert len([name for name, id in model["vocab"].items() if len(name) == 1 and id < 288]) == 256


def test_any_text_comes_back(trained):
    for text in ("  two  spaces\n\n\ttab", "café 漢字 🙂", "don't 1234567", "", "\x00\x7f"):
        assert trained.decode(trained.encode(text, add_special_tokens=False).ids) == text


def test_training_is_reproducible(trained):
    assert train_vocabulary(TEXTS, 320).to_str() == trained.to_str()


def test_too_little_text_is_refused():
    with pytest.raises(ConfigError, match="base ranks"):
        train_vocabulary(["abc"], 2048)
    with pytest.raises(ConfigError):
        special_names(5)


def test_the_written_folder_opens_in_transformers_and_herd(trained, tmp_path):
    from herd.tokenizer.files import load_tokenizer

    transformers = pytest.importorskip("transformers")
    write_tokenizer(trained, tmp_path, 512)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    own = load_tokenizer(tmp_path)
    for text in ("the dog ran", " 12345 cats!", "don't\n\nstop"):
        ids = trained.encode(text, add_special_tokens=False).ids
        assert auto.encode(text) == [288, *ids]
        assert own.encode(text) == ids
        assert own.encode(text, bos=True) == [288, *ids]
    assert auto.eos_token_id == 288 + 9
    assert own.family == "llama3"
