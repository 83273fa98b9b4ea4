"""Llama 3 and 4 against Meta's own tokenizers and the published test vectors."""

from __future__ import annotations

import os
import time
import unicodedata

import pytest

from herd.errors import TokenizerError
from herd.tokenizer import tiktoken as module
from herd.tokenizer.cuts import MAX_SLICE
from herd.tokenizer.special import byte_bpe_specials
from herd.tokenizer.tiktoken import REGEX, TiktokenTokenizer
from tests.tokenizer import texts
from tests.tokenizer.conftest import meta, opened

FOX = "The quick brown fox jumps over the lazy dog."
VECTORS = {
    "llama3": {
        "Hello world": [9906, 1917],
        "This is a test sentence.": [2028, 374, 264, 1296, 11914, 13],
        FOX: [791, 4062, 14198, 39935, 35308, 927, 279, 16053, 5679, 13],
        "123456": [4513, 10961],
        "  hello": [220, 24748],
        "don't": [15357, 956],
        "DON'T": [85741, 17773],
        "café 漢字 🙂": [936, 59958, 110385, 95, 19113, 28584],
        "def f(x):\n    return x\n\n": [755, 282, 2120, 997, 262, 471, 865, 271],
        "a\r\nb": [64, 319, 65],
        "http://a.b/c/": [1277, 1129, 64, 960, 2971, 14],
        "\t\tx": [197, 10436],
        "\n\n": [271],
        "system": [9125],
        "user": [882],
        "assistant": [78191],
        "ipython": [23799, 4690],
        "safe": [19193],
        "unsafe": [39257],
        "\n\nsafe": [271, 19193],
        "\nS1": [198, 50, 16],
        "<|eot_id|>": [27, 91, 68, 354, 851, 91, 29],
    },
    "llama4": {
        "Hello world": [19873, 3817],
        "This is a test sentence.": [3231, 373, 262, 1600, 17705, 26],
        FOX: [954, 7202, 27756, 92637, 67072, 1278, 290, 37463, 10877, 26],
        "123456": [7235, 19596],
        "  hello": [220, 47244],
        "don't": [127161],
        "DON'T": [173549, 59842],
        "café 漢字 🙂": [1349, 53389, 220, 61557, 4899, 72951],
        "def f(x):\n    return x\n\n": [1251, 288, 2595, 1960, 277, 677, 831, 368],
        "a\r\nb": [77, 13266, 78],
        "http://a.b/c/": [3303, 1050, 77, 1943, 2646, 27],
        "\t\tx": [197, 27398],
        "\n\n": [368],
        "system": [15651],
        "user": [1556],
        "assistant": [140680],
        "ipython": [607, 6934],
        "safe": [60411],
        "unsafe": [72110],
        "\n\nsafe": [368, 60411],
        "\nS1": [198, 63, 29],
        "<|eot|>": [40, 104, 81, 359, 159276],
    },
}


def tiny(**changes: object) -> TiktokenTokenizer:
    """A vocabulary of 259 ranks and Llama 3's first 32 special names, as herd's own small model has."""
    ranks = [bytes((b,)) for b in range(256)] + [b"he", b"ll", b"hell"]
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    listed = {name: 259 + i for i, name in enumerate(names)}
    return TiktokenTokenizer(ranks, "llama3", byte_bpe_specials("llama3", 259, listed), **changes)  # type: ignore[arg-type]


def naive_merge(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The whole-piece rule and byte-pair merging, as plainly as they can be written."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes((b,)) for b in piece]
    while len(parts) > 1:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best == len(ranks):
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def test_vectors(family: str) -> None:
    tokenizer = opened(family)
    assert {text: tokenizer.encode(text) for text in VECTORS[family]} == VECTORS[family]


def test_ids_equal_metas_on_hard_and_generated_texts(family: str) -> None:
    ours, theirs = opened(family), meta(family)
    for text in texts.ALL + texts.generate(20_000, seed=3):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False), text
        assert ours.decode(ids) == text


def test_trusted_text_equals_metas_with_all_specials_allowed(family: str) -> None:
    ours, theirs = opened(family), meta(family)
    names = list(theirs.special_tokens)
    trusted = ["".join(f"{name} text{name}" for name in names[i : i + 40]) for i in range(0, len(names), 40)]
    for text in trusted + texts.NAUGHTY:
        expected = theirs.encode(text, bos=False, eos=False, allowed_special="all")
        assert ours.encode(text, allow_special=True) == expected


def test_merging_equals_a_naive_one(family: str) -> None:
    regex = pytest.importorskip("regex")
    tokenizer = opened(family)
    ranks = {token: rank for rank, token in enumerate(tokenizer.ranks)}
    pattern = regex.compile(REGEX[family])  # type: ignore[index]
    for text in texts.ALL + texts.generate(1_500, seed=4):
        if any(unicodedata.category(char) == "Cn" for char in text):
            continue  # characters newer than some Unicode table: the two regex engines know different versions
        ids = [id for piece in pattern.findall(text) for id in naive_merge(piece.encode(), ranks)]
        assert tokenizer.encode(text) == ids, text


def test_no_special_id_comes_from_user_text(family: str) -> None:
    tokenizer = opened(family)
    limit = len(tokenizer.ranks)
    for name in [*tokenizer.special.ids, *tokenizer.special.aliases]:
        for text in (name, f"a{name}b", f" {name}\n", name * 2):
            assert max(tokenizer.encode(text)) < limit


def test_specials_are_metas(family: str) -> None:
    ours, theirs = opened(family), meta(family)
    assert dict(ours.special.ids) == theirs.special_tokens
    assert ours.vocab_size == theirs.n_words
    assert (ours.special.bos, ours.special.eos, ours.special.pad) == (theirs.bos_id, theirs.eos_id, theirs.pad_id)
    assert ours.special.stop == set(theirs.stop_tokens)


def test_bos_and_eos_are_added_once(family: str) -> None:
    tokenizer = opened(family)
    bos, eos = tokenizer.special.bos, tokenizer.special.eos
    assert tokenizer.encode("", bos=True, eos=True) == [bos, eos]
    plain = tokenizer.encode("Hello")
    assert tokenizer.encode("Hello", bos=True) == [bos, *plain]
    assert tokenizer.encode("Hello", eos=True) == [*plain, eos]
    trusted = "<|begin_of_text|>Hello<|end_of_text|>"
    assert tokenizer.encode(trusted, bos=True, eos=True, allow_special=True) == [bos, *plain, eos]
    assert tokenizer.encode(trusted, bos=True).count(bos) == 1


def test_batch_equals_one_by_one(family: str) -> None:
    tokenizer = opened(family)
    many = texts.ALL + texts.generate(700, seed=5)
    for threads in (1, 3):
        assert tokenizer.encode_batch(many, bos=True, threads=threads) == [tokenizer.encode(t, bos=True) for t in many]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_long_texts_are_encoded_in_threads_that_survive_a_fork(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = opened(family)
    long = ("".join(texts.generate(2_000, seed=6)) * 40)[: 2 * MAX_SLICE + 17]
    monkeypatch.setattr(module, "_cores", lambda: 1)
    alone = tokenizer.encode(long)
    monkeypatch.setattr(module, "_cores", lambda: 3)
    assert len(long) > 2 * MAX_SLICE
    assert tokenizer.encode(long, bos=True)[1:] == alone
    child = os.fork()
    if child == 0:
        os._exit(0 if tokenizer.encode(long) == alone else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_lone_surrogate_in_a_long_text_is_refused(family: str) -> None:
    with pytest.raises(TokenizerError, match=r"U\+D83D at character 900000"):
        opened(family).encode("ab " * 300_000 + "\ud83d")


def test_lone_surrogate_is_refused(family: str) -> None:
    for encode in (opened(family).encode, lambda text: opened(family).encode_batch([text])):
        with pytest.raises(TokenizerError, match=r"U\+D83D at character 3"):
            encode("abc\ud83d")
    with pytest.raises(TokenizerError, match=r"U\+DFFF"):
        opened(family).encode("<|eot_id|>\udfff", allow_special=True)


def test_bytes_of_every_id(family: str) -> None:
    tokenizer = opened(family)
    assert b"".join(tokenizer.bytes_of(id) for id in range(256)).hex() != ""
    assert {tokenizer.bytes_of(id) for id in tokenizer.special.ids.values()} == {b""}
    ids = list(range(tokenizer.vocab_size))
    assert tokenizer.decode(ids[:1000]) == b"".join(map(tokenizer.bytes_of, ids[:1000])).decode("utf-8", "replace")


def test_special_tokens_in_decoded_text(family: str) -> None:
    tokenizer = opened(family)
    ids = [tokenizer.special.bos, *tokenizer.encode("hi"), tokenizer.special.eos]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>hi<|end_of_text|>"


@pytest.mark.parametrize("id", [-1, 128_256, 10**9])
def test_unknown_id(id: int) -> None:
    tokenizer = opened("llama3")
    for call in (tokenizer.bytes_of, tokenizer.piece, lambda one: tokenizer.decode([5, one])):
        with pytest.raises(TokenizerError, match=str(id)):
            call(id)


def test_piece_is_printable() -> None:
    tokenizer = opened("llama3")
    assert [tokenizer.piece(id) for id in tokenizer.encode("a 漢\n")] == ["a", " \\xe6\\xbc", "\\xa2", "\\n"]
    assert tokenizer.piece(128_009) == "<|eot_id|>"
    assert "llama3" in repr(tokenizer)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        *(("llama3", text) for text in ("a", "^", "0", " ", "\n", "😀", "'s")),
        *(("llama4", text) for text in ("a", "'s")),
        *(pytest.param("llama4", text, marks=pytest.mark.slow) for text in ("^", "0", " ", "\n", "😀")),
    ],
)
def test_one_megabyte_of_one_thing_takes_less_than_a_second(family: str, text: str) -> None:
    tokenizer = opened(family)
    megabyte = text * (1_000_000 // len(text.encode()))
    start = time.process_time()  # CPU time of all threads: other processes of the machine do not count
    ids = tokenizer.encode(megabyte)
    assert time.process_time() - start < 1.0
    assert tokenizer.decode(ids) == megabyte


def test_small_vocabulary_of_the_same_scheme() -> None:
    tokenizer = tiny()
    assert tokenizer.vocab_size == 263
    assert tokenizer.encode("hello", bos=True) == [259, 258, ord("o")]
    assert tokenizer.encode("<|eot_id|>", allow_special=True) == [262]
    assert tokenizer.special.stop == {260, 261, 262}
    assert tokenizer.special.pad is None


def test_visible_added_tokens_are_text() -> None:
    special = byte_bpe_specials("llama3", 256, {"<|begin_of_text|>": 256, "<|eot_id|>": 257, "<tool>": 258})
    tokenizer = TiktokenTokenizer([bytes((b,)) for b in range(256)], "llama3", special, visible=[258])
    assert tokenizer.decode([256, 258, 97, 257]) == "<tool>a"
    assert tokenizer.bytes_of(258) == b"<tool>"
    assert 258 not in tokenizer.encode("<tool>")
    assert tokenizer.special.eos == 257  # without <|end_of_text|>, what ends a turn ends the text


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([bytes((b,)) for b in range(1, 256)], "1 of the 256 single bytes are missing, the first is 0x00"),
        ([bytes((b,)) for b in range(256)] + [b"a"], "share the same bytes"),
        ([bytes((b,)) for b in range(256)] + [b"he", b"ll", b"hell", b"xx"], "lies inside"),
    ],
)
def test_ranks_that_are_no_vocabulary(ranks: list[bytes], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        TiktokenTokenizer(ranks, "llama3", tiny().special)


def test_sentencepiece_family_is_refused() -> None:
    with pytest.raises(TokenizerError, match="not a byte-BPE one"):
        TiktokenTokenizer([bytes((b,)) for b in range(256)], "llama2", tiny().special)
