import random
import unicodedata

import pytest

from herd.data.duplicates import HASHES, Duplicates, jaccard, shingles, signature
from herd.data.words import _HARD, _PLAIN, _WORDS, grams, word_hashes, words

SIGMAS = 5.0
"""Standard errors of an estimate that chance exceeds once in two million; there are some hundred here."""


def _texts(seed: int, count: int) -> list[str]:
    """Documents, and copies of earlier ones with more or less of their words changed."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(4000)]
    texts: list[str] = []
    for _ in range(count):
        if texts and rng.random() < 0.5:
            found = rng.choice(texts).split()
            for _ in range(rng.choice((0, 1, 2, 4, 8, 16))):
                found[rng.randrange(len(found))] = rng.choice(vocabulary)
        else:
            found = [rng.choice(vocabulary) for _ in range(rng.randint(40, 200))]
        texts.append(" ".join(found))
    return texts


def test_words():
    assert words("The CAT's hat, don't-stop 42 ½!") == ["the", "cat", "s", "hat", "don", "t", "stop", "42", "½"]
    assert words("Größe ÇA naïve") == ["größe", "ça", "naïve"]
    assert words("我爱 ไทยแลนด์") == ["我", "爱", "ไ", "ท", "ย", "แ", "ล", "น", "ด์"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("...") == []


def test_the_quick_pattern_is_the_careful_one_where_it_is_used():
    for code in range(0x110000):
        if 0xD800 <= code < 0xE000 or unicodedata.category(chr(code)) == "Cn":
            continue
        text = f"a{chr(code).lower()}b"
        if not _HARD.search(text):
            assert _WORDS.findall(text) == _PLAIN.findall(text), hex(code)


def test_grams_are_equal_where_the_words_are():
    hashes = word_hashes(["a", "b", "c", "d", "a", "b", "c"])
    runs = grams(hashes, 3)
    assert len(runs) == 5
    assert runs[0] == runs[4]
    assert len(set(runs.tolist())) == 4
    assert grams(word_hashes(["c", "b", "a"]), 3)[0] not in runs
    assert len(grams(hashes, 8)) == 0


def test_estimates_are_as_good_as_their_standard_error():
    texts = _texts(1, 120)
    minima = [signature(text) for text in texts]
    looked_at = 0
    for i, j in [(a, b) for a in range(len(texts)) for b in range(max(a - 30, 0), a)]:
        estimate = (minima[i] == minima[j]).mean()
        if estimate > 0.05:
            true = jaccard(texts[i], texts[j])
            assert abs(estimate - true) <= SIGMAS * (true * (1 - true) / HASHES) ** 0.5 + 1 / HASHES
            looked_at += 1
    assert looked_at > 30


SLACK = 0.12
"""Three standard errors of the estimate at 0.8: pairs inside of threshold +- SLACK may be seen either way."""


@pytest.mark.parametrize("seed", [2, 3])
def test_near_duplicates_are_those_of_every_pair_compared(seed):
    """The twin: every text against every earlier one that stays, by the exact similarity of their sets."""
    texts = _texts(seed, 250)
    seen = Duplicates(0.8)
    for i, text in enumerate(texts):
        seen.add(text, "f", i)
    found = seen.find()
    runs = [set(shingles(text).tolist()) for text in texts]
    sure = 0
    for i in range(len(texts)):
        best = max((len(runs[i] & runs[j]) / len(runs[i] | runs[j]) for j in range(i) if j not in found), default=0.0)
        if best > 0.8 + SLACK:
            assert i in found
            sure += 1
        if i in found:
            assert best > 0.8 - SLACK
            assert abs(best - found[i].similarity) < 2 * SLACK
    assert sure > 10


def test_exact_ones_are_told_apart_and_the_first_stays():
    seen = Duplicates()
    texts = [
        "One two three four five six.",
        "other words of another kind",
        "One  two\nthree four five six. ",
        "Cafe\u0301 au",
        "Café au",
    ]
    texts += ["ONE two three four five six!"]
    assert [seen.add(text, "f.jsonl", i + 1) for i, text in enumerate(texts)] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    found = seen.find()
    assert [(i, d.where, d.of, d.exact) for i, d in found.items()] == [
        (2, "f.jsonl:3", "f.jsonl:1", True),
        (4, "f.jsonl:5", "f.jsonl:4", True),
        (5, "f.jsonl:6", "f.jsonl:1", False),
    ]
    only = Duplicates(near=False)
    for i, text in enumerate(texts):
        only.add(text, "f.jsonl", i + 1)
    assert list(only.find()) == [2, 4]


def test_a_chain_of_small_changes_is_not_eaten_whole():
    start = [f"w{i}" for i in range(200)]
    chain = [" ".join([*(f"x{j}" for j in range(8 * step)), *start[8 * step :]]) for step in range(12)]
    seen = Duplicates(0.8)
    for i, text in enumerate(chain):
        seen.add(text, "f", i)
    kept = [i for i in range(12) if i not in seen.find()]
    assert 3 <= len(kept) <= 6  # components of a graph would keep one
    assert jaccard(chain[0], chain[-1]) < 0.5


def test_empty_and_short_texts():
    assert len(shingles("")) <= 1
    assert len(shingles("one two")) == 1
    seen = Duplicates()
    for i, text in enumerate(["", "...", "yes", "Yes!", "no"]):
        seen.add(text, "f", i)
    assert set(seen.find()) >= {3}
    assert not {2, 4} & set(seen.find())
