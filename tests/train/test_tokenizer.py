"""Vocabularies of one's own: against the tokenizers and sentencepiece libraries and a plain twin; hostile input."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece

from herd.cli.main import run
from herd.convert.torture import texts as hard_texts
from herd.errors import ConfigError, DataError
from herd.tokenizer.bytelevel import from_alphabet
from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.tiktoken import REGEX
from herd.train.bytepairs import BYTES, LONGEST, MIN_COUNT, count_pieces, learn_ranks
from herd.train.corpus import PART, parts, sample
from herd.train.piecetrainer import LINE, lines_of, train_pieces
from herd.train.tokenizer import learn, special_count
from tests.conftest import shared_path

SOUNDS = [
    "the",
    "do",
    "ra",
    "to",
    "a",
    "cat",
    "an",
    "ov",
    "hi",
    "wi",
    "ma",
    "mo",
    "naïve",
    "café",
    "漢",
    "字",
    "n't",
    "'LL",
    "12",
    "=",
]
WORDS = [
    *("don't", "I'LL", "1234567", "x=y()", "words,"),
    *(f"{one}{two}" for one in SOUNDS for two in SOUNDS[::3]),
]


@pytest.fixture(scope="module")
def texts() -> list[bytes]:
    """A few thousand lines whose words have very different counts, with letters of several scripts."""
    draw = random.Random(7)
    return ["\n".join(" ".join(draw.choices(WORDS, k=9)) for _ in range(60)).encode() for _ in range(40)]


@pytest.fixture(scope="module")
def source(texts: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in texts))
    return path


def plain_ranks(pieces: Counter[bytes], size: int) -> list[bytes]:
    """The definition: count all pairs, merge the most frequent everywhere, begin again."""
    ranks = list(BYTES)
    words = {piece: [ranks.index(bytes([byte])) for byte in piece] for piece in pieces}
    while len(ranks) < size:
        pairs: Counter[tuple[int, int]] = Counter()
        for piece, word in words.items():
            for pair in pairwise(word):
                pairs[pair] += pieces[piece]
        count, (left, right) = max(((n, pair) for pair, n in pairs.items()), key=lambda e: (e[0], -e[1][0], -e[1][1]))
        assert count >= MIN_COUNT
        token = ranks[left] + ranks[right]
        if token not in ranks:
            ranks.append(token)
        for word in words.values():
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [ranks.index(token)]
                at += 1
    return ranks


def test_ranks_equal_those_of_counting_everything_anew(texts: list[bytes]) -> None:
    pieces = count_pieces([*texts[:3], b"aaaaaaa aaa aaaa abab ababab " * 3], "llama3")
    assert learn_ranks(pieces, 300) == plain_ranks(pieces, 300)


@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_ranks_equal_those_of_the_tokenizers_package(texts: list[bytes], family: str) -> None:
    kit = pytest.importorskip("tokenizers")
    other = kit.Tokenizer(kit.models.BPE(ignore_merges=True))
    level = kit.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = kit.pre_tokenizers.Split(kit.Regex(REGEX[family]), behavior="isolated", invert=False)
    other.pre_tokenizer = kit.pre_tokenizers.Sequence([split, level])
    trainer = kit.trainers.BpeTrainer(
        vocab_size=340, min_frequency=MIN_COUNT, show_progress=False, initial_alphabet=level.alphabet()
    )
    other.train_from_iterator((text.decode() for text in texts), trainer)
    names = [name for name, _ in sorted(other.get_vocab().items(), key=lambda entry: entry[1])]
    assert learn_ranks(count_pieces(texts, family), 340) == from_alphabet(names)


def test_the_order_of_pieces_does_not_matter(texts: list[bytes]) -> None:
    pieces = count_pieces(texts, "llama3")
    assert learn_ranks(dict(sorted(pieces.items())), 330) == learn_ranks(pieces, 330)


def test_the_first_ranks_are_in_the_order_of_metas_file() -> None:
    released = load_tokenizer(shared_path("data/tokenizers/llama3.tokenizer.model"))
    assert tuple(released.ranks[:256]) == BYTES


def test_a_run_of_letters_as_long_as_a_book_ends_soon() -> None:
    draw = random.Random(3)
    run_on = "".join(draw.choices("ACGT", k=40 * LONGEST)).encode()
    assert max(map(len, count_pieces([run_on], "llama3"))) == LONGEST
    assert len(learn_ranks(count_pieces([run_on], "llama3"), 600)) == 600


def test_pieces_equal_those_of_the_library_in_one_go(texts: list[bytes]) -> None:
    """The library in this process, with the settings that Llama 2's file names, on the same lines."""
    made = learn(texts, "sentencepiece", 330)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(text.decode() for text in texts).split("\n")),
        model_writer=model, vocab_size=330, model_type="bpe", character_coverage=0.99995, split_digits=True, byte_fallback=True,
        allow_whitespace_only_pieces=True, normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=-1,
    )  # fmt: skip
    twin = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in [*hard_texts(), *(text.decode() for text in texts[:5])]:
        assert made.encode(text) == twin.encode(text)
    assert all("12" not in piece for piece in made.model.pieces[259:]), "digits are split"
    assert made.model.pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert made.decode(made.encode("🙂 ☃")) == "🙂 ☃", "letters that were not learned fall back to bytes"


def test_rules_equal_those_of_llama_2s_file(texts: list[bytes]) -> None:
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    specs = []
    for data in (
        shared_path("data/tokenizers/llama2.tokenizer.model").read_bytes(),
        train_pieces(texts, 330).source,
    ):
        model = pb2.ModelProto()
        model.ParseFromString(data)
        specs.append(model)
    theirs, ours = specs
    for name in (
        "model_type", "character_coverage", "max_sentencepiece_length", "split_by_unicode_script", "split_by_number",
        "split_by_whitespace", "split_digits", "allow_whitespace_only_pieces", "byte_fallback", "unk_id", "bos_id", "eos_id",
        "pad_id", "treat_whitespace_as_suffix",
    ):  # fmt: skip
        assert getattr(ours.trainer_spec, name) == getattr(theirs.trainer_spec, name), name
    for name in ("name", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(ours.normalizer_spec, name) == getattr(theirs.normalizer_spec, name), name


def test_no_line_is_left_out_by_the_library() -> None:
    """Lines with the library's own mark, without a space for longer than it takes, and with tabs."""
    texts = ["▅ab ab▅\tcd cd\n\n".encode() * 50, ("語" * 3 * LINE).encode()]
    lines = list(lines_of(texts))
    assert max(len(line.decode()) for line in lines) <= LINE + 1
    assert b"".join(lines).replace(b"\n", b"") == b"".join(texts).replace("▅".encode(), b"").replace(b"\n", b"")
    assert "ab" in "".join(train_pieces(texts, 275).pieces)


@pytest.mark.parametrize("scheme", ["tiktoken", "sentencepiece"])
def test_the_command_writes_every_form_and_the_same_bytes_again(
    scheme: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = pytest.importorskip("tokenizers")
    told = []
    for name in ("one", "two"):
        args = [
            "tokenizer",
            "train",
            str(source),
            "--kind",
            scheme,
            "--vocab-size",
            "340",
            "--out",
            str(tmp_path / name),
        ]
        assert run([*args, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["sha256"] == told[1]["sha256"]
    for name in told[0]["files"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    made = load_tokenizer(tmp_path / "one")
    assert made.vocab_size == 340
    other = kit.Tokenizer.from_file(str(tmp_path / "one" / "tokenizer.json"))
    other.encode_special_tokens = True
    for text in hard_texts():
        assert other.encode(text, add_special_tokens=False).ids == made.encode(text), text
    if scheme == "tiktoken":
        assert made.special.bos == 340 - 12
        assert made.special.get("<|eot_id|>") == 340 - 3


def test_a_sample_is_bounded_spread_and_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " + "x" * 50}) + "\n" for i in range(1000)))
    one, two = (sample([str(path)], 10_000) for _ in range(2))
    assert one.texts == two.texts
    assert 9_000 < one.kept <= 10_000 < one.size
    assert not one.whole
    places = [int(text.split()[1]) for text in one.texts]
    assert places == sorted(places)
    assert sum(place < 500 for place in places) == pytest.approx(len(places) / 2, rel=0.3)
    assert sample([str(path)], 10**9).whole


def test_long_documents_are_cut_at_lines_and_between_characters() -> None:
    lined = (b"a" * 99 + b"\n") * (PART // 50)
    assert b"".join(parts(lined)) == lined
    assert all(part.endswith(b"\n") and len(part) <= PART for part in parts(lined))
    solid = "é語".encode() * (PART // 3)
    assert b"".join(parts(solid)) == solid
    for part in parts(solid):
        part.decode()
    assert list(parts(b"")) == []


def test_hostile_texts_are_refused_with_the_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--kind", "tiktoken", "--vocab-size", "300", "--out", str(tmp_path / "out")]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "fine fine"}\n{"text": "\xff"}\n')
    assert run(["tokenizer", "train", str(bad), *args]) == 1
    assert "bad.jsonl:2: not UTF-8" in capsys.readouterr().err
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b" \n\n")
    assert run(["tokenizer", "train", str(empty), *args]) == 1
    assert "no row" in capsys.readouterr().err
    assert run(["tokenizer", "train", str(bad), str(bad), *args]) == 1
    assert "named twice" in capsys.readouterr().err
    assert run(["tokenizer", "train", str(bad), "--bad", "skip", *args]) == 1
    told = capsys.readouterr().err
    assert "bad.jsonl:2" in told
    assert "more text" in told
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".herd-new-*")) == []


def test_more_tokens_than_the_text_can_give_are_refused(texts: list[bytes]) -> None:
    with pytest.raises(ConfigError, match=r"gives \d[\d,]* ranks .* not 50,000"):
        learn(texts, "tiktoken", 50_256)
    with pytest.raises(ConfigError, match="at most") as refused:
        learn(texts, "sentencepiece", 50_000)
    most = int(str(refused.value).split("ask for ")[1].split()[0])
    assert learn(texts, "sentencepiece", most).vocab_size == most
    with pytest.raises(ConfigError, match="letters alone"):
        learn(texts, "sentencepiece", 262)
    for scheme, size in (("sentencepiece", 259), ("tiktoken", 260)):
        with pytest.raises(ConfigError, match="special"):
            learn(texts, scheme, size)
    with pytest.raises(ConfigError, match="no text"):
        learn([], "sentencepiece", 300)
    with pytest.raises(ConfigError, match="no text"):
        learn([b""], "tiktoken", 300)
    with pytest.raises(DataError, match="no such data file"):
        sample(["nowhere.jsonl"], 10)


def test_special_tokens_are_as_many_as_asked_and_enough() -> None:
    assert special_count("llama3", 128_256) == 256
    assert special_count("llama4", 202_048) == 2048
    assert special_count("llama3", 400) == 12
    assert special_count("llama3", 4096, 32) == 32
    with pytest.raises(ConfigError):
        special_count("llama3", 4096, 5)
    with pytest.raises(ConfigError):
        special_count("llama4", 4096, 3000)
