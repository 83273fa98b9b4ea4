"""How much to guess: as much as pays, measured while it runs, with a bound on what guessing may cost. No torch.

Two accounts. Each sequence has one in rows: a wrong guess costs a part of a step, a right one is worth a step. The engine has
one in seconds: a step with guesses is compared with what steps without have lately taken for as many tokens. Nobody guesses on
an account below zero; it fills again, slowly, with the steps that are made without. A step begins with one guess for all
sequences together, and has twice as many as the last one when that paid, so one step cannot lose much either. So all guesses that
do not pay together take at most `LOSS` of the time, however bad they are and whatever a row costs on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from herd.engine.request import Sequence

__all__ = ["Pace"]

LOSS = 0.015
"""The part of the time that may be lost to guesses: half of what 0.97 allows, the rest is for the noise of clocks."""
START = 1.0
"""Plain steps that may be lost before anything is known."""
MOST = 16.0
"""Plain steps that an account holds at most: how long bad guesses go on after good ones."""
ROW = 0.2
"""What one more row is taken to cost, in steps, in the accounts of sequences."""
FRESH = 96
"""Steps after which the time of a plain one is measured again."""
WARM = 2
"""Plain steps that are measured before the first guess."""


@dataclass(slots=True)
class _Sequence:
    """`credit` in plain steps, and how many guesses next."""

    credit: float = START
    count: int = 2


@dataclass(slots=True)
class _Plain:
    """Seconds of a plain step with so many sequences, lately; how many were measured; and steps since."""

    seconds: float = 0.0
    measured: int = 0
    since: int = 0


class Pace:
    """`most` guesses for one sequence at a time; `always` guesses whether it pays or not (for measurements and tests)."""

    def __init__(self, most: int = 8, *, always: bool = False) -> None:
        self.most, self.always = most, always
        self.balance = 0.0
        """Seconds won by guessing and not lost again."""
        self.drafted, self.accepted = 0, 0
        self._width = self._left = 1
        """Guesses of one step, all sequences together, and how many of them this step can still have."""
        self._started = False
        self._plain: dict[int, _Plain] = {}
        self._sequences: dict[Sequence, _Sequence] = {}

    def begin(self) -> None:
        """A step begins."""
        self._left = self._width

    def count(self, sequence: Sequence, decodes: int) -> int:
        """How many tokens to guess for `sequence` in a step of `decodes` sequences."""
        if self.always:
            return self.most
        plain = self._plain.get(decodes)
        if plain is None or plain.measured < WARM or plain.since >= FRESH or self.balance < 0:
            return 0
        known = self._sequences.setdefault(sequence, _Sequence())
        if known.credit < 0:
            known.credit += LOSS
            return 0
        count = min(known.count, self.most, self._left)
        self._left -= count
        return count

    def learn(self, sequence: Sequence, drafted: int, right: int) -> None:
        """Of `drafted` guesses for `sequence`, the first `right` were."""
        self.drafted += drafted
        self.accepted += right
        known = self._sequences.setdefault(sequence, _Sequence())
        known.credit = min(MOST, known.credit + right - ROW * drafted)
        known.count = min(self.most, 2 * known.count if right == drafted else right + 1)

    def settle(self, decodes: int, drafted: int, made: int, seconds: float) -> None:
        """A step of `decodes` sequences with `drafted` guesses gave `made` tokens in `seconds`."""
        plain = self._plain.setdefault(decodes, _Plain())
        if drafted == 0:
            part = 1 / min(plain.measured + 1, 8)
            # A pause (another program, a collection of garbage) is no measure of a step.
            usual = seconds if plain.measured < WARM else min(seconds, 2 * plain.seconds)
            plain.seconds += (usual - plain.seconds) * part
            plain.measured += 1
            plain.since = 0
            if not self._started:
                self._started, self.balance = True, START * plain.seconds
            self.balance += LOSS * usual
        else:
            plain.since += 1
            longest = 2 * (1 + drafted) * plain.seconds  # a pause again
            won = plain.seconds * made / decodes - min(seconds, longest)
            self.balance += won
            self._width = min(2 * self._width, self.most * decodes) if won > 0 else max(1, self._width // 2)
        self.balance = min(self.balance, MOST * plain.seconds)

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._sequences.pop(sequence, None)
