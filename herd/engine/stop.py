"""Stop strings across token boundaries. No torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Text in, text out, ending before the first stop string; text that may begin one is held back until it is decided.

    First is the one that is complete first, and of those the longest: then it does not matter in which pieces text comes.

    >>> m = StopMatcher(["END"])
    >>> m.push("the E"), m.push("ND of it"), m.matched
    ('the ', '', True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.matched = False
        self.met: str | None = None
        """The stop string that was met."""
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can be shown now; empty for ever once a stop string was met."""
        if self.matched:
            return ""
        self._held += text
        found = min(((at + len(s), at) for s in self.stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.matched, self.met = True, self._held[found[1] : found[0]]
            shown, self._held = self._held[: found[1]], ""
            return shown
        keep = self._undecided()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _undecided(self) -> int:
        """Length of the longest tail that is a proper prefix of some stop string."""
        longest = max((len(s) for s in self.stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self.stop):
                return n
        return 0
