"""The cuts of long text: exactly Meta's, and found without looking at every character."""

from __future__ import annotations

import random

import pytest

from herd.tokenizer.cuts import MAX_RUN, MAX_SLICE, cut
from tests.tokenizer.conftest import meta, opened


def meta_cuts(text: str) -> list[str]:
    """What Meta's encoder cuts the text into, by its own slow splitter."""
    split = type(meta("llama3"))._split_whitespaces_or_nonwhitespaces
    return [part for i in range(0, len(text), MAX_SLICE) for part in split(text[i : i + MAX_SLICE], MAX_RUN)]


def long_texts() -> list[str]:
    n = MAX_RUN
    rng = random.Random(0)
    made = [
        "a" * n, "a" * (n + 1), " " * (n + 1), "a" * (2 * n), "a" * (2 * n + 1), " " * (3 * n + 7),
        "a" * (n - 1) + " " + "b" * (n + 1), " " * n + "a" * n + "\n" * (n + 1), ("a" * n + " ") * 3,
        "x " * n, "\x1c" * (n + 5), "\u00a0\u2003" * n, "🙂" * (n + 3), "漢字" * n,
        "word " * 100_000, "a" * (MAX_SLICE + 1), " " * (MAX_SLICE - 1) + "ab", "word " * 79_999 + "a" * 60_000,
    ]  # fmt: skip
    for _ in range(12):
        runs = rng.choices(["a", " ", "\n", "é", "\x1f", "\u3000"], k=rng.randrange(2, 9))
        made.append("".join(char * rng.choice([1, 5, n - 1, n, n + 1, 2 * n + 1, 40_000]) for char in runs))
    return made


def test_cuts_equal_metas() -> None:
    for text in long_texts():
        assert [part for part in cut(text) if part] == [part for part in meta_cuts(text) if part]


def test_ids_of_long_runs_equal_metas(family: str) -> None:
    for text in long_texts()[:13]:
        assert opened(family).encode(text) == meta(family).encode(text, bos=False, eos=False)


@pytest.mark.parametrize("text", ["", "a", " ", "a b"])
def test_short_text_is_one_part(text: str) -> None:
    assert cut(text) == [text]
