"""The console: results go to stdout, everything else to stderr, and colours only where somebody looks.

Nothing heavy is imported here; rich comes in only when a progress bar is really drawn.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = [
    "Tick",
    "busy",
    "coloured",
    "is_interactive",
    "is_terminal",
    "note",
    "progress",
    "safe",
    "silent_keys",
    "styled",
]

PATIENCE = 2.0
"""Seconds that a piece of work may take before a progress bar is drawn."""
CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    127: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""Control characters to their printable pictures: a model's text must not be able to steer the terminal."""


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is at the other end of `stream` (closed and missing streams are not)."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def is_interactive() -> bool:
    """Whether a person can type here and see what comes back."""
    return is_terminal(sys.stdin) and is_terminal(sys.stdout) and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    """Whether to style what is written to `stream`: a terminal that is not dumb, and no NO_COLOR (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO) -> str:
    """`text` in one of the styles of CODES where `stream` takes colours, else as it is."""
    return f"\x1b[{CODES[style]}m{text}\x1b[0m" if coloured(stream) else text


def note(text: str, style: str = "dim") -> None:
    """One line beside the results, on stderr."""
    print(styled(text, style, sys.stderr), file=sys.stderr, flush=True)


def safe(text: str) -> str:
    """`text` with control characters made visible, newline and tab excepted."""
    return text.translate(CONTROLS)


class Tick(Protocol):
    """Told how far a piece of work is: `done` of `total` units."""

    def __call__(self, done: int, total: int) -> None: ...


@contextlib.contextmanager
def progress(label: str, unit: str = "") -> Iterator[Tick]:
    """Gives a Tick that draws a bar with rate and time left on stderr, once the work has taken PATIENCE seconds.

    Only on a terminal; the bar is gone when the work is done and when the block ends. `unit` is what is counted ("tokens");
    "bytes" are shown as such.
    """
    started = time.monotonic()
    bar: tuple[Progress, TaskID] | None = None

    def tick(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and time.monotonic() - started >= PATIENCE and done < total and is_terminal(sys.stderr):
            bar = _draw(label, unit, total)
        if bar is not None:
            bar[0].update(bar[1], completed=done, total=total)
            if done >= total:
                bar[0].stop()
                bar = None

    try:
        yield tick
    finally:
        if bar is not None:
            bar[0].stop()


@contextlib.contextmanager
def busy(label: str) -> Iterator[None]:
    """A spinner with the time gone by on stderr, for work of unknown length that takes more than PATIENCE seconds."""
    if not is_terminal(sys.stderr):
        yield
        return
    shown: list[Progress] = []
    timer = threading.Timer(PATIENCE, lambda: shown.append(_spin(label)))
    timer.daemon = True
    timer.start()
    try:
        with silent_keys():
            yield
    finally:
        timer.cancel()
        timer.join()  # it may be drawing at this moment
        for spinner in shown:
            spinner.stop()


def _spin(label: str) -> Progress:
    from rich import progress as parts
    from rich.console import Console

    columns = (parts.SpinnerColumn(), parts.TextColumn("{task.description}"), parts.TimeElapsedColumn())
    drawn = parts.Progress(*columns, console=Console(stderr=True), transient=True)
    drawn.add_task(label, total=None)
    drawn.start()
    return drawn


def _draw(label: str, unit: str, total: int) -> tuple[Progress, TaskID]:
    from rich import progress as parts
    from rich.console import Console

    class Rate(parts.ProgressColumn):
        """Units per second so far."""

        def render(self, task: Any) -> str:
            return f"{task.completed / task.elapsed:,.0f} {unit}/s" if task.elapsed else ""

    counts = (
        [parts.DownloadColumn(), parts.TransferSpeedColumn()]
        if unit == "bytes"
        else [parts.MofNCompleteColumn(), Rate()]
    )
    drawn = parts.Progress(
        parts.TextColumn("{task.description}"),
        parts.BarColumn(bar_width=24),
        *counts,
        parts.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    drawn.start()
    return drawn, drawn.add_task(label, total=total)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Inside, the terminal does not echo keys into what is shown; what is typed waits for the next prompt."""
    try:
        import termios
    except ImportError:  # not a Unix
        yield
        return
    if not is_terminal(sys.stdin):
        yield
        return
    before = termios.tcgetattr(sys.stdin.fileno())
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)
