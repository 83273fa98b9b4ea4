"""How a download of several files goes: bars on a terminal, a line now and then anywhere else.

A `herd.hub.fetch.Watch`. Rates count what came over the wire, not what an earlier try had left.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from herd.cli.console import is_terminal, note, safe
from herd.cli.sizes import duration, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Downloads", "downloads"]

SILENCE = 10.0
"""Seconds between two lines where there is no terminal."""
REDRAW = 0.1
"""Seconds between two updates of the bars."""
WINDOW = 15.0
"""Seconds that a rate is the mean of."""


class _Meter:
    """Bytes per second over the last WINDOW seconds."""

    def __init__(self) -> None:
        self.came = 0
        self._marks: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        now = time.monotonic()
        if not self._marks:  # waiting for a turn is no part of the rate
            self._marks.append((now, 0))
            return
        self.came += count
        if now - self._marks[-1][0] >= REDRAW:
            self._marks.append((now, self.came))
            while len(self._marks) > 2 and now - self._marks[1][0] > WINDOW:
                self._marks.popleft()

    @property
    def rate(self) -> float:
        if not self._marks:
            return 0.0
        then, before = self._marks[0]
        gone = time.monotonic() - then
        return (self.came - before) / gone if gone > 0.5 else 0.0


class _Row:
    """One file: its size, what is here, its meter, and its bar when there is one."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.meter = total, 0, _Meter()
        self.bar: TaskID | None = None
        self.drawn = 0.0


class Downloads:
    """Files on their way. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._lock = threading.Lock()
        self._all = _Meter()
        self._said = self._drawn_at = time.monotonic()
        self._bars: Progress | None = None
        self._total: TaskID | None = None
        self._over = False

    def begin(self, files: list[tuple[str, int]]) -> None:
        """The files, before the first byte."""
        with self._lock:
            self._rows = {name: _Row(total) for name, total in files}
            self._all = _Meter()
            if is_terminal(sys.stderr):
                self._bars = _drawn()
                self._total = self._bars.add_task(f"{len(files)} files, {size(self._sum)}", total=self._sum, note="")
                self._bars.start()
            else:
                note(f"downloading {len(files)} files, {size(self._sum)}")

    def moved(self, name: str, done: int) -> None:
        """`done` bytes of a file are here, the last of them from the network."""
        with self._lock:
            row = self._rows[name]
            fresh = max(done - row.done, 0)
            row.done = done
            row.meter.add(fresh)
            self._all.add(fresh)
            self._show(name, row)

    def kept(self, name: str, done: int) -> None:
        """`done` bytes of a file were here already."""
        with self._lock:
            row = self._rows[name]
            row.done = done
            self._show(name, row)

    def note(self, text: str) -> None:
        """A line above the bars."""
        with self._lock:
            if self._bars is not None:
                self._bars.console.print(safe(text), style="dim", markup=False, highlight=False)
            else:
                note(safe(text))

    def end(self) -> None:
        """No more bars, and no more lines: threads that still wait for a dead connection are not listened to."""
        with self._lock:
            self._over = True
            if self._bars is not None:
                self._bars.stop()
                self._bars = None

    @property
    def _sum(self) -> int:
        return sum(row.total for row in self._rows.values())

    def _show(self, name: str, row: _Row) -> None:
        now = time.monotonic()
        if self._over:
            return
        if self._bars is None:
            if now - self._said >= SILENCE:
                self._said = now
                here = sum(row.done for row in self._rows.values())
                note(f"{here / max(self._sum, 1):4.0%} of {size(self._sum)}, {self._pace(self._all, self._sum - here)}")
            return
        over = row.done >= row.total
        if now - row.drawn < REDRAW and not over:
            return
        row.drawn = now
        if over and row.bar is not None:
            self._bars.remove_task(row.bar)
            row.bar = None
        elif not over:
            if row.bar is None:
                row.bar = self._bars.add_task(_short(name), total=row.total, note="")
            self._bars.update(row.bar, completed=row.done, note=self._pace(row.meter, row.total - row.done))
        here = sum(row.done for row in self._rows.values())
        assert self._total is not None
        self._bars.update(self._total, completed=here, note=self._pace(self._all, self._sum - here))

    def _pace(self, meter: _Meter, left: int) -> str:
        rate = meter.rate
        return f"{size(rate)}/s, {duration(left / rate)} left" if rate else "starting"


@contextlib.contextmanager
def downloads() -> Iterator[Downloads]:
    """Downloads whose bars are gone when the block ends."""
    shown = Downloads()
    try:
        yield shown
    finally:
        shown.end()


def _drawn() -> Progress:
    from rich import progress as parts
    from rich.console import Console
    from rich.table import Column

    return parts.Progress(
        parts.TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        parts.BarColumn(bar_width=10),
        parts.TaskProgressColumn(),
        parts.TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
    )


def _short(name: str) -> str:
    """A file name that leaves room for its bar: the end tells parts apart."""
    name = safe(name)
    return name if len(name) <= 34 else "..." + name[-31:]
