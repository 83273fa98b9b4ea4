"""Quality rules for web and book text, each with a name, a bound and a source. No torch.

The rules are those of Gopher (Rae et al. 2021, table A1: quality and repetition) and of C4 (Raffel et al. 2020), as rules about
whole documents: where C4 takes single lines out of a page, nothing is rewritten here. They were made for English web pages in
prose: code, verse, tables, lists and languages without spaces fail them for good reasons, and are better filtered by other means.
Words are split at white space here, as in the papers.

| rule | a document is left out when |
|---|---|
| `words` | it has fewer than `min_words` or more than `max_words` words |
| `word-length` | the mean length of its words is outside `min_word_length` to `max_word_length` characters |
| `symbols` | "#" or an ellipsis stand for more than `max_symbols` of its words |
| `bullets` | more than `max_bullets` of its lines begin with a bullet |
| `ellipses` | more than `max_ellipses` of its lines end with an ellipsis |
| `letters` | fewer than `min_letters` of its words hold a letter |
| `stop-words` | fewer than `min_stop_words` of the, be, to, of, and, that, have, with stand in it |
| `repeated-lines`, `repeated-paragraphs` | more than the share of lines (paragraphs) repeat an earlier one |
| `repeated-line-characters`, `repeated-paragraph-characters` | such lines (paragraphs) hold more than the share of characters |
| `top-2-gram` to `top-4-gram` | the commonest run of that many words holds more than the share of characters |
| `repeated-5-grams` to `repeated-10-grams` | runs of that many words that occur before hold more than the share |
| `sentences` | it has fewer than `min_sentences` sentence ends |
| `placeholder` | it says "lorem ipsum" |
| `braces` | it holds a curly brace |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from herd.data.words import Hashes, grams, word_hashes
from herd.errors import ConfigError

__all__ = ["GROUPS", "Rules", "judge"]

GROUPS: Mapping[str, str] = {
    "gopher": "quality rules of Gopher: words, word-length, symbols, bullets, ellipses, letters, stop-words",
    "repetition": "repetition rules of Gopher: repeated lines, paragraphs and runs of words",
    "c4": "rules of C4: sentences, placeholder, braces",
}
"""Groups of rules that are switched on together."""

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = (
    "\u2022",
    "\u2023",
    "\u25b6",
    "\u25c0",
    "\u25e6",
    "\u25a0",
    "\u25a1",
    "\u25aa",
    "\u25ab",
    "\u2013",
    "-",
    "*",
)
_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE = re.compile(r"[.!?\u2026\u3002\u0964]+[\"'\u201d\u2019)\]]*(?=\s|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Bounds of the rules; the defaults are the papers'. `groups` are those of GROUPS that are asked for."""

    groups: tuple[str, ...] = ("gopher", "repetition")
    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols: float = 0.1
    max_bullets: float = 0.9
    max_ellipses: float = 0.3
    min_letters: float = 0.8
    min_stop_words: int = 2
    max_repeated_lines: float = 0.3
    max_repeated_paragraphs: float = 0.3
    max_repeated_line_characters: float = 0.2
    max_repeated_paragraph_characters: float = 0.2
    max_top_grams: Mapping[int, float] = field(default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16})
    max_repeated_grams: Mapping[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    )
    min_sentences: int = 5

    def __post_init__(self) -> None:
        if unknown := [name for name in self.groups if name not in GROUPS]:
            raise ConfigError(f"there is no group of rules {unknown[0]!r}; choose of {', '.join(GROUPS)}")

    @staticmethod
    def names() -> tuple[str, ...]:
        """The bounds that are single numbers, by name: what can be set on the command line."""
        return tuple(f.name for f in fields(Rules) if f.name not in ("groups", "max_top_grams", "max_repeated_grams"))


def judge(text: str, rules: Rules) -> str | None:
    """The name of the first rule that `text` breaks, None when it keeps them all."""
    for group in GROUPS:
        if group in rules.groups:
            for name in _CHECKS[group](text, rules):
                return name
    return None


def _gopher(text: str, rules: Rules) -> Iterator[str]:
    found = text.split()
    count = len(found)
    if not rules.min_words <= count <= rules.max_words:
        yield "words"
    mean = sum(map(len, found)) / max(count, 1)
    if not rules.min_word_length <= mean <= rules.max_word_length:
        yield "word-length"
    if max(text.count("#"), text.count("...") + text.count("\u2026")) > rules.max_symbols * count:
        yield "symbols"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > rules.max_bullets * len(lines):
        yield "bullets"
    if sum(line.endswith(("...", "\u2026")) for line in lines) > rules.max_ellipses * len(lines):
        yield "ellipses"
    if sum(1 for word in found if _LETTER.search(word)) < rules.min_letters * count:
        yield "letters"
    if len(_STOP_WORDS.intersection(text.lower().split())) < rules.min_stop_words:
        yield "stop-words"


def _repetition(text: str, rules: Rules) -> Iterator[str]:
    for pieces, name, most, most_characters in (
        (text.splitlines(), "line", rules.max_repeated_lines, rules.max_repeated_line_characters),
        (
            re.split(r"\n\s*\n", text),
            "paragraph",
            rules.max_repeated_paragraphs,
            rules.max_repeated_paragraph_characters,
        ),
    ):
        said = [piece.strip() for piece in pieces if piece.strip()]
        seen: set[str] = set()
        again = [piece for piece in said if piece in seen or seen.add(piece)]
        if len(again) > most * len(said):
            yield f"repeated-{name}s"
        if sum(map(len, again)) > most_characters * len(text):
            yield f"repeated-{name}-characters"
    found = text.split()
    hashes = word_hashes(found)
    sizes = np.fromiter(map(len, found), np.int64, len(found))
    for n, most in rules.max_top_grams.items():
        if _top(hashes, sizes, n) > most * len(text):
            yield f"top-{n}-gram"
    least = min(rules.max_repeated_grams.values(), default=0.0)
    for n, most in sorted(rules.max_repeated_grams.items()):
        covered = _repeated(hashes, sizes, n)
        if covered > most * len(text):
            yield f"repeated-{n}-grams"
        if covered <= least * len(text):  # longer runs that repeat lie inside of shorter ones: they cover no more
            return


def _top(hashes: Hashes, sizes: NDArray[np.int64], n: int) -> int:
    """Characters that the commonest run of `n` words holds, all of its places together; 0 when every run is alone."""
    _, first, counts = np.unique(grams(hashes, n), return_index=True, return_counts=True)
    if not len(counts) or counts.max() < 2:
        return 0
    most = counts.max()
    at = int(first[counts == most].min())
    return int(sizes[at : at + n].sum()) * int(most)


def _repeated(hashes: Hashes, sizes: NDArray[np.int64], n: int) -> int:
    """Characters of words inside a run of `n` words that stood before; each word counts once."""
    runs = grams(hashes, n)
    _, first = np.unique(runs, return_index=True)
    again = np.ones(len(runs), bool)
    again[first] = False
    edges = np.zeros(len(sizes) + 1, np.int64)
    np.add.at(edges, np.flatnonzero(again), 1)
    np.add.at(edges, np.flatnonzero(again) + n, -1)
    return int(sizes[edges.cumsum()[:-1] > 0].sum())


def _c4(text: str, rules: Rules) -> Iterator[str]:
    if len(_SENTENCE.findall(text)) < rules.min_sentences:
        yield "sentences"
    if "lorem ipsum" in text.lower():
        yield "placeholder"
    if "{" in text or "}" in text:
        yield "braces"


_CHECKS: Mapping[str, Callable[[str, Rules], Iterator[str]]] = {"gopher": _gopher, "repetition": _repetition, "c4": _c4}
