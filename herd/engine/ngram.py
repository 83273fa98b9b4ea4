"""Guessing the next tokens from the text itself: what followed the last time the same tokens stood there. No model.

Good where a reply repeats its prompt or itself: code edits, summaries, extraction, loops. Source: prompt lookup decoding
(Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from herd.engine.request import Sequence
from herd.engine.speculate import Ask, Draft
from herd.errors import ConfigError
from herd.model.config import ModelConfig

__all__ = ["NgramDrafter", "NgramIndex"]


class NgramIndex:
    """Where every run of `shortest` to `longest` tokens of a growing text ended last. Each token is looked at once."""

    __slots__ = ("_last", "_seen", "longest", "shortest")

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest, self.longest = shortest, longest
        self._last: dict[int, int] = {}
        """Hash of a run -> the position after it. Runs are compared on a hit: a hash may lie."""
        self._seen = 0
        """Runs that end at or before this position are known."""

    def continuation(self, tokens: Seq[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the longest known run at the end of `tokens`; none when there is no such run.

        `tokens` must begin with those of earlier calls. When the run overlaps its end, the period goes on.
        """
        total = len(tokens)
        for end in range(self._seen + 1, total):  # the run at the very end has no continuation yet
            for length in range(self.shortest, min(self.longest, end) + 1):
                self._last[hash((length, *tokens[end - length : end]))] = end
        self._seen = max(self._seen, total - 1)
        for length in range(min(self.longest, total - 1), self.shortest - 1, -1):
            tail = tokens[total - length :]
            end = self._last.get(hash((length, *tail)))
            if end is not None and tokens[end - length : end] == tail:
                period = total - end
                return [tokens[end + i % period] for i in range(count)]
        return []


class NgramDrafter:
    """Prompt lookup: guesses up to `count` tokens, those after the latest earlier place of the text's last `longest` to
    `shortest` tokens, the longest run that is found. Raises ConfigError.
    """

    def __init__(self, count: int = 8, *, shortest: int = 2, longest: int = 4) -> None:
        if not 1 <= shortest <= longest or count < 1:
            raise ConfigError(
                f"runs of {shortest} to {longest} tokens and {count} guesses: give 1 <= shortest <= longest"
            )
        self.count, self.shortest, self.longest = count, shortest, longest
        self._indexes: dict[Sequence, NgramIndex] = {}

    def check(self, config: ModelConfig) -> None:
        """Text can be repeated whatever the model."""

    def draft(self, asked: Seq[Ask]) -> list[Draft]:
        """Guesses for each sequence, none where its last tokens are new."""
        out = []
        for ask in asked:
            index = self._indexes.get(ask.sequence)
            if index is None:
                index = self._indexes[ask.sequence] = NgramIndex(self.shortest, self.longest)
            out.append(Draft(tuple(index.continuation(ask.sequence.tokens, min(ask.count, self.count)))))
        return out

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._indexes.pop(sequence, None)
