"""Beam search: the replies that a model finds likeliest as a whole, several prefixes being followed at once. No torch.

Scores are sums of log-probabilities over length ** length_penalty, the end included in both. A reply that has ended makes room
for no other: so many are kept as there are beams, and the search ends when none that still grows could enter them as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from herd.chat.params import MAX_LOGPROBS
from herd.engine.request import Finish
from herd.errors import ConfigError

__all__ = ["MOST", "Beam", "check_beams", "search"]

MOST = MAX_LOGPROBS // 2
"""Most beams: each step looks at twice as many continuations, as all of one beam's may end."""

Next = Callable[[Sequence[tuple[int, ...]]], Sequence[dict[int, float]]]
"""Prefixes to the log-probabilities of their likeliest next ids."""


@dataclass(frozen=True, slots=True)
class Beam:
    """A reply: ids, the sum of their log-probabilities, its score, and why it ended."""

    tokens: tuple[int, ...]
    logprob: float
    score: float
    finish: Finish


def check_beams(beams: int) -> None:
    """Raise ConfigError for more beams than can be followed."""
    if beams > MOST:
        raise ConfigError(f"beams is {beams}: at most {MOST} are followed")


def search(next_of: Next, *, beams: int, most: int, stops: frozenset[int], penalty: float, limit: Finish) -> list[Beam]:
    """The best `beams` replies of at most `most` tokens, best first. `limit` is the finish of those that `most` cut.

    `next_of` gives at least 2 * beams alternatives for every prefix, where the vocabulary has so many.
    """
    growing: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    ended: list[Beam] = []
    for length in range(1, most + 1):
        found = next_of([tokens for tokens, _ in growing])
        candidates = [
            (total + logprob, (*tokens, id))
            for (tokens, total), alternatives in zip(growing, found, strict=True)
            for id, logprob in alternatives.items()
        ]
        candidates.sort(key=lambda one: (-one[0], one[1]))
        growing = []
        for total, tokens in candidates[: 2 * beams]:
            if tokens[-1] in stops:
                ended.append(Beam(tokens, total, total / length**penalty, "stop"))
            elif len(growing) < beams:
                growing.append((tokens, total))
        ended = sorted(ended, key=lambda beam: -beam.score)[:beams]
        if not growing:
            break
        if len(ended) == beams and ended[-1].score >= max(total for _, total in growing) / length**penalty:
            return ended
    cut = [Beam(tokens, total, total / len(tokens) ** penalty, limit) for tokens, total in growing]
    return sorted(ended + cut, key=lambda beam: -beam.score)[:beams]
