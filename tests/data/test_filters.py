import random
import re
from collections import Counter

import numpy as np
import pytest

from herd.data.filters import Rules, _repeated, _top, judge
from herd.data.languages import UNDETERMINED, language
from herd.data.read import read_rows
from herd.data.words import word_hashes
from herd.errors import ConfigError
from tests.conftest import shared_path

_rng = random.Random(0)
_VOCABULARY = [f"{a}{b}en" for a in "bcdfghklm" for b in ("a", "e", "i", "o", "ur", "ent")]
_LITTLE = ("the", "of", "and", "to", "have", "with", "that", "be")


def _sentence() -> str:
    said = [_rng.choice(_LITTLE) if _rng.random() < 0.3 else _rng.choice(_VOCABULARY) for _ in range(14)]
    return f"{' '.join(said).capitalize()}."


PROSE = "\n\n".join("\n".join(_sentence() for _ in range(4)) for _ in range(5))
FOREIGN = re.sub(rf"\b({'|'.join(_LITTLE)})\b", "guten", PROSE, flags=re.IGNORECASE)
ALL = Rules(groups=("gopher", "repetition", "c4"))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (None, PROSE),
        ("words", PROSE[:100]),
        ("words", "word " * 100_001),
        ("word-length", " ".join(["of", "to", "be"] * 40)),
        ("word-length", " ".join(["extraordinarily"] * 100)),
        ("symbols", PROSE.replace(" the ", " # # ").replace(" of ", " # # ").replace(" and ", " # # ")),
        ("symbols", PROSE.replace("en ", "en... ")),
        ("bullets", "\n".join(f"- {line}" for line in PROSE.split("\n") if line)),
        ("ellipses", PROSE.replace(".", "...").replace("... ", ". ").replace("\n\n", "\n")),
        ("letters", PROSE + " 12345" * 100),
        ("stop-words", FOREIGN),
        ("repeated-lines", PROSE + "\n" + "\n".join(["Read more here today."] * 30)),
        ("repeated-lines", "\n\n".join([PROSE, *["See also\nthe rest."] * 9])),
        ("top-2-gram", PROSE + "".join(f"\nSubscribe, everybody {_rng.choice(_VOCABULARY)} {i}" for i in range(60))),
        ("repeated-5-grams", f"{PROSE} {' '.join(PROSE.split()[20:90])}"),
        ("sentences", PROSE.replace(".", "")),
        ("placeholder", PROSE + " Lorem Ipsum dolor."),
        ("braces", PROSE + " {"),
    ],
)  # fmt: skip
def test_each_rule_catches_what_it_is_for(rule, text):
    assert judge(text, ALL) == rule


def _plain_repeated(found: list[str], n: int) -> int:
    """The twin of the counted share: word by word."""
    seen: set[tuple[str, ...]] = set()
    inside = [False] * len(found)
    for at in range(len(found) - n + 1):
        run = tuple(found[at : at + n])
        if run in seen:
            inside[at : at + n] = [True] * n
        seen.add(run)
    return sum(len(word) for word, hit in zip(found, inside, strict=True) if hit)


def _plain_top(found: list[str], n: int) -> int:
    counts = Counter(tuple(found[at : at + n]) for at in range(len(found) - n + 1))
    run, count = counts.most_common(1)[0] if counts else ((), 0)
    return sum(map(len, run)) * count if count > 1 else 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_counts_of_runs_are_those_of_counting_word_by_word(seed, n):
    rng = random.Random(seed)
    for size in (0, 1, n, 40, 300):
        found = [rng.choice(["a", "bb", "ccc", "dddd"][: 2 + seed % 3]) for _ in range(size)]
        sizes = np.array([len(word) for word in found], np.int64)
        assert _repeated(word_hashes(found), sizes, n) == _plain_repeated(found, n)
        assert _top(word_hashes(found), sizes, n) == _plain_top(found, n)


def test_longer_runs_cover_no_more():
    rng = random.Random(7)
    for _ in range(50):
        found = [rng.choice(["a", "bb", "ccc"]) for _ in range(rng.randint(1, 200))]
        sizes = np.array([len(word) for word in found], np.int64)
        covered = [_repeated(word_hashes(found), sizes, n) for n in range(2, 12)]
        assert covered == sorted(covered, reverse=True)


def test_bounds_can_be_moved_and_groups_must_exist():
    assert judge("The short and the long.", Rules(min_words=3)) is None
    with pytest.raises(ConfigError, match="'goofer'"):
        Rules(groups=("goofer",))
    assert "min_words" in Rules.names()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "It was the best of times, it was the worst of times, and they had everything before them."),
        ("de", "Es war einmal ein König, der hatte eine Tochter, und sie war so schön wie die Sonne."),
        ("nl", "Er was eens een koning die een dochter had, en zij was zo mooi als de zon."),
        ("ja", "むかしむかし、あるところに、おじいさんとおばあさんが住んでいました。"),
        ("zh", "从前有一个国王，他有一个女儿，她像太阳一样美丽。"),
        ("ko", "옛날 옛적에 한 왕이 살았습니다."),
        ("uk", "Жив собі король, і була в нього донька, гарна, як сонце."),
        ("ru", "Жил-был король, и была у него дочь, прекрасная, как солнце, и любил он её очень."),
        ("fa", "یکی بود یکی نبود، پادشاهی بود که دختری زیبا داشت و گل می‌چید."),
        (UNDETERMINED, "x = [i ** 2 for i in range(10)]; print(sum(x))"),
        (UNDETERMINED, "12345 67890 !!"),
        (UNDETERMINED, ""),
        (UNDETERMINED, "Anna Berlin Peter Hamburg Julia Bremen Otto Mainz Karl Trier"),
    ],
)
def test_languages(code, text):
    assert language(text).code == code


def test_languages_of_parallel_sentences():
    """492 sentences of news and encyclopedia in eight languages, translations of each other (PUD)."""
    wrong, unsure, total = [], 0, 0
    for row in read_rows(shared_path("data/eval/pud_parallel.jsonl.gz")):
        for code in ("en", "de", "fr", "it", "pt", "hi", "es", "th"):
            got = language(row[code]).code
            total += 1
            unsure += got == UNDETERMINED
            wrong += [(row[code], got)] if got not in (code, UNDETERMINED) else []
    assert total == 8 * 492
    assert len(wrong) < 0.004 * total, wrong
    assert unsure < 0.06 * total
