"""Scores of continuations: how a pair is tokenized, which pairs run together, and what their log-probabilities come to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from herd.chat.base import BaseFormat
from herd.chat.model import Score
from herd.engine.completion import Completion
from herd.errors import PromptError

__all__ = ["joined", "rounds", "score_of"]


def joined(base: BaseFormat, context: str, continuation: str, number: int) -> tuple[list[int], int]:
    """Ids of both texts as one, and where the continuation begins. Raises PromptError, naming the pair, when it is empty."""
    whole = base.complete(context + continuation).tokens
    before = base.complete(context).tokens
    start = 0
    while start < min(len(before), len(whole)) and before[start] == whole[start]:
        start += 1
    if not continuation or start == len(whole):
        raise PromptError(f"pair {number}: the continuation is empty, so there is nothing to score")
    return whole, max(1, start)


def rounds(contexts: Sequence[str], width: int) -> Iterator[list[int]]:
    """Which pairs are scored at the same time: of each context the first, so that the others find it in the cache, then those.

    `width` contexts at a time, in their order: the cache must not have forgotten them by then.
    """
    groups: dict[str, list[int]] = {}
    for i, context in enumerate(contexts):
        groups.setdefault(context, []).append(i)
    if len(groups) == len(contexts):
        yield list(range(len(contexts)))
        return
    every = list(groups.values())
    for first in range(0, len(every), width):
        part = every[first : first + width]
        yield [group[0] for group in part]
        if rest := [i for group in part for i in group[1:]]:
            yield rest


def score_of(completion: Completion) -> Score:
    """The sum over the continuation's tokens, from a completion with prompt_logprobs."""
    scored = [one for one in completion.prompt_logprobs or () if one is not None]
    greedy = all(next(iter(one.top)) == one.token for one in scored)
    return Score(math.fsum(one.logprob for one in scored), len(scored), greedy)
