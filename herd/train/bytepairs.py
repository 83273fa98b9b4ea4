"""Byte BPE as Llama 3 and 4 have it: which tokens to learn from how often each piece of the text occurs. No torch.

The family's regex cuts the text into pieces; inside the pieces the pair of tokens that stands side by side most often becomes
a token, again and again (Sennrich et al. 2016, over bytes as in openai/gpt-2). Of equally frequent pairs the one of the smaller
ids is taken, as the tokenizers package does, which gives the same tokens. The 256 bytes come first, in the order of Meta's
files.

Only the pieces that hold the pair are touched, so the whole work is about one step for each byte of the distinct pieces.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import regex

from herd.errors import ConfigError
from herd.tokenizer.bytelevel import to_alphabet
from herd.tokenizer.tiktoken import REGEX
from herd.tokenizer.tokenizer import Family

__all__ = ["BYTES", "LONGEST", "MIN_COUNT", "count_pieces", "learn_ranks"]

BYTES: tuple[bytes, ...] = tuple(
    sorted((bytes([byte]) for byte in range(256)), key=lambda byte: to_alphabet([byte])[0])
)
"""The first 256 ranks: printable bytes, then the others, as in Meta's files."""

MIN_COUNT = 2
"""A pair that occurs only once is chance, not language."""

LONGEST = 1024
"""Characters of the longest piece that is learned from as one: one letter run of a book's length would take hours, and no token
that long is of use."""

_SHIFT = 24  # two ids in one integer, which hashes faster than a tuple and is ordered alike


def count_pieces(
    texts: Iterable[bytes], family: Family, tick: Callable[[int], None] = lambda done: None
) -> Counter[bytes]:
    """How often each piece occurs that the regex of `family` cuts UTF-8 `texts` into. `tick` is told the bytes that are done.

    Pieces of more than LONGEST characters are counted in parts of that length.
    """
    cut = regex.compile(REGEX[family]).findall
    found: Counter[str] = Counter()
    done = 0
    for text in texts:
        found.update(cut(text.decode("utf-8")))
        tick(done := done + len(text))
    for piece in [piece for piece in found if len(piece) > LONGEST]:
        count = found.pop(piece)
        for at in range(0, len(piece), LONGEST):
            found[piece[at : at + LONGEST]] += count
    return Counter({piece.encode("utf-8"): count for piece, count in found.items()})


def learn_ranks(
    pieces: Mapping[bytes, int], size: int, tick: Callable[[int, int], None] = lambda done, total: None
) -> list[bytes]:
    """The bytes of `size` ranks learned from `pieces` (each with its count). The order of `pieces` does not matter.

    `tick` is told how many ranks there are. Raises ConfigError when there are too few pairs for so many ranks, or for fewer
    than 256 ranks.
    """
    if not 256 <= size < 1 << _SHIFT:
        raise ConfigError(
            f"{size:,} ranks: there are at least 256, one for each byte, and at most {(1 << _SHIFT) - 1:,}"
        )
    ranks = list(BYTES)
    ids = {token: id for id, token in enumerate(ranks)}
    of_byte = [ids[bytes([byte])] for byte in range(256)]
    words = [[of_byte[byte] for byte in piece] for piece in pieces]
    counts = list(pieces.values())
    pairs: dict[int, int] = {}
    where: dict[int, list[int]] = {}
    for at, word in enumerate(words):
        count = counts[at]
        for left, right in pairwise(word):
            pair = left << _SHIFT | right
            pairs[pair] = pairs.get(pair, 0) + count
            where.setdefault(pair, []).append(at)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(queue)
    while len(ranks) < size:
        left, right = _most(queue, pairs, len(ranks), size)
        pair = left << _SHIFT | right
        token = ranks[left] + ranks[right]
        id = ids.get(token)
        if id is None:  # the same bytes may already be a token made of other halves
            id = ids[token] = len(ranks)
            ranks.append(token)
        changed: set[int] = set()
        for at in dict.fromkeys(where.pop(pair)):
            words[at] = _merged(words[at], left, right, id, at, counts[at], pairs, where, changed)
        pairs.pop(pair, None)
        for new in changed:
            if pairs.get(new, 0) > 0:
                heapq.heappush(queue, (-pairs[new], new))
        if len(ranks) % 64 == 0:
            tick(len(ranks), size)
    return ranks


def _most(queue: list[tuple[int, int]], pairs: Mapping[int, int], have: int, size: int) -> tuple[int, int]:
    """The pair that occurs most often. Entries whose count has changed since are put right when they come up."""
    while queue:
        count, pair = heapq.heappop(queue)
        now = pairs.get(pair, 0)
        if now != -count:
            if now > 0:
                heapq.heappush(queue, (-now, pair))
            continue
        if now < MIN_COUNT:
            break
        return pair >> _SHIFT, pair & ((1 << _SHIFT) - 1)
    raise ConfigError(
        f"the text gives {have:,} ranks (bytes, and pairs that occur at least {MIN_COUNT} times), not {size:,}: give it more "
        f"text, or ask for {size - have:,} tokens less"
    )


def _merged(
    word: list[int],
    left: int,
    right: int,
    id: int,
    at: int,
    count: int,
    pairs: dict[int, int],
    where: dict[int, list[int]],
    changed: set[int],
) -> list[int]:
    """`word` (number `at`) with `id` for every `left`, `right` side by side, from the left; pairs are counted anew."""
    made: list[int] = []
    i, last = 0, len(word) - 1
    while i <= last:
        token = word[i]
        if token != left or i == last or word[i + 1] != right:
            made.append(token)
            i += 1
            continue
        if made:
            before = made[-1]
            pairs[before << _SHIFT | left] = pairs.get(before << _SHIFT | left, 0) - count
            new = before << _SHIFT | id
            pairs[new] = pairs.get(new, 0) + count
            where.setdefault(new, []).append(at)
            changed.add(new)
        if i + 1 < last:
            after = word[i + 2]
            pairs[right << _SHIFT | after] = pairs.get(right << _SHIFT | after, 0) - count
            new = id << _SHIFT | after
            pairs[new] = pairs.get(new, 0) + count
            where.setdefault(new, []).append(at)
            changed.add(new)
        made.append(id)
        i += 2
    return made
