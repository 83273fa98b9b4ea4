"""How a run ends early: signals that ask it to save and go, and the errors that say why.

| exit | when |
|---|---|
| 0 | the budget is used up |
| 1 | any other error |
| 3 | a checkpoint could not be written (disk full, read-only, I/O error); the last one is whole |
| 4 | a loss or gradient that is not finite; the weights are those of the step before, nothing was saved over |
| 75 | SIGTERM or SIGUSR1: saved, not finished; the same command goes on from there (EX_TEMPFAIL, so that schedulers try again) |
| 130 | Ctrl-C: saved, not finished; a second Ctrl-C ends at once, without saving |
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from herd.errors import CheckpointError, HerdError

__all__ = ["NonFiniteError", "SaveError", "Stopped", "Stopper"]

ASKING = ("SIGTERM", "SIGINT", "SIGUSR1")


class SaveError(CheckpointError):
    """A training checkpoint that could not be written; earlier ones are whole. `need` and `free` are bytes, when known."""

    exit_code = 3

    def __init__(self, message: str, *, path: Any = None, need: int | None = None, free: int | None = None) -> None:
        super().__init__(message, path=path)
        self.need, self.free = need, free


class NonFiniteError(HerdError):
    """A loss, gradient or weight that is not finite. The optimiser step was not taken. `where` names the module or weight."""

    exit_code = 4

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class Stopped(HerdError):
    """The run was asked to stop by the signal `name`, has saved (when it has a folder), and can be resumed."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name
        self.exit_code = 130 if name == "SIGINT" else 75


class Stopper:
    """Remembers the first signal that asks to stop. `asked` is its name, or None."""

    def __init__(self) -> None:
        self.asked: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over; in a thread other than the main one Python gives none, and nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for name in ASKING:
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None:
                before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or signal.Signals(number).name
