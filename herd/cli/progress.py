"""Signs of life on stderr for work that takes long: drawn after PATIENCE seconds on a terminal, gone when it is done.

Where stderr is a file or a pipe, bars become plain lines, one every PLAIN seconds; what ends before that says nothing.

rich is imported only when something is really drawn.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from herd.cli.console import is_terminal, note, silent_keys

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Tick", "busy", "progress"]

PATIENCE = 2.0
"""Seconds that a piece of work may take before anything is drawn."""


PLAIN = 10.0
"""Seconds between lines where stderr is no terminal: a log of an hour's work stays readable."""


class Tick(Protocol):
    """Told how far a piece of work is: `done` of `total` units. done = total ends the bar."""

    def __call__(self, done: int, total: int) -> None: ...


@contextlib.contextmanager
def progress(label: str, unit: str = "", beside: Callable[[], str] | None = None) -> Iterator[Tick]:
    """Gives a Tick behind a bar with rate and time left; `unit` is what is counted ("tokens"; "bytes" are shown as such).

    `beside` gives a text that stands behind the rate, asked for whenever the bar is drawn. Until the first tick the bar only
    moves. It is gone when the block ends, if not before.
    """
    bar = _Later(lambda: _bar(label, unit, beside)) if is_terminal(sys.stderr) else _Lines(label, unit)
    try:
        yield bar.tick
    finally:
        bar.end()


@contextlib.contextmanager
def busy(label: str) -> Iterator[None]:
    """A spinner with the time gone by, for work of unknown length. Keys typed meanwhile wait for the next prompt."""
    spinner = _Later(lambda: _spinner(label))
    try:
        with silent_keys():
            yield
    finally:
        spinner.end()


class _Later:
    """What `draw` gives, drawn by a timer after PATIENCE seconds unless the work is over by then."""

    def __init__(self, draw: Callable[[], Progress]) -> None:
        self._draw = draw
        self._drawn: Progress | None = None
        self._over = not is_terminal(sys.stderr)
        self._at: tuple[int, int | None] = 0, None
        self._lock = threading.Lock()
        self._timer = threading.Timer(PATIENCE, self._start)
        self._timer.daemon = True
        if not self._over:
            self._timer.start()

    def tick(self, done: int, total: int) -> None:
        with self._lock:
            self._at = done, total
            self._show()
        if done >= total:
            self.end()

    def end(self) -> None:
        with self._lock:
            self._over = True
            self._timer.cancel()
            if self._drawn is not None:
                self._drawn.stop()
                self._drawn = None

    def _start(self) -> None:
        with self._lock:
            if not self._over:
                self._drawn = self._draw()
                self._show()
                self._drawn.start()

    def _show(self) -> None:
        if self._drawn is not None:
            self._drawn.update(self._drawn.task_ids[0], completed=self._at[0], total=self._at[1])


class _Lines:
    """Plain lines for logs, written by the ticks themselves."""

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._began = self._said = time.monotonic()

    def tick(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said < PLAIN or done >= total:
            return
        self._said, gone = now, now - self._began
        left = gone * (total - done) / max(done, 1)
        digits = 1 if total < 10e6 else 0
        size = (
            f"{done / 1e6:,.{digits}f} of {total / 1e6:,.{digits}f} MB"
            if self._unit == "bytes"
            else f"{done:,} of {total:,} {self._unit}"
        )
        note(f"{self._label}: {done / max(total, 1):.0%}, {size.rstrip()}, {gone:.0f} s, about {left:.0f} s left")

    def end(self) -> None:
        """Nothing is drawn that would have to go."""


def _spinner(label: str) -> Progress:
    from rich import progress as parts

    return _drawing(label, parts.SpinnerColumn(), parts.TextColumn("{task.description}"), parts.TimeElapsedColumn())


def _bar(label: str, unit: str, beside: Callable[[], str] | None) -> Progress:
    from rich import progress as parts
    from rich.table import Column

    class Rate(parts.ProgressColumn):
        """Units per second so far."""

        def render(self, task: Any) -> str:
            return f"{task.speed:,.0f} {unit}/s" if task.speed else ""

    counts = (
        [parts.DownloadColumn(), parts.TransferSpeedColumn()]
        if unit == "bytes"
        else [parts.MofNCompleteColumn(), Rate()]
    )
    if beside is not None:
        say = beside

        class Beside(parts.ProgressColumn):
            """What the caller has to say."""

            def render(self, task: Any) -> str:
                return say()

        counts.append(Beside(Column(no_wrap=True)))
    left = parts.TimeRemainingColumn(elapsed_when_finished=True)
    return _drawing(label, parts.TextColumn("{task.description}"), parts.BarColumn(bar_width=24), *counts, left)


def _drawing(label: str, *columns: Any) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    drawn = Progress(*columns, console=Console(stderr=True), transient=True)
    drawn.add_task(label, total=None)
    return drawn
