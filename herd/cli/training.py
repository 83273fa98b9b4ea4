"""How a run looks while it trains: three lines that move on a terminal, plain lines in a log. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from herd.cli.console import is_terminal, note, safe
from herd.cli.progress import Tick, progress
from herd.train.config import RunConfig

if TYPE_CHECKING:
    from rich.console import Group

    from herd.train.metrics import Figures
    from herd.train.watch import Begin, StepReport

__all__ = ["Screen"]

SMOOTH = 20
"""Steps over which speed and loss are averaged for the eye; the log has every step."""
BARS = "▁▂▃▄▅▆▇█"


class Screen:
    """A watcher for people. `say` prints what does not belong to a step."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.live: Any = None
        self.last: deque[StepReport] = deque(maxlen=SMOOTH)
        self.losses: list[float] = []
        self.held_out = ""
        self.judging: tuple[int, int, float] | None = None  # rows done, of how many, when it began
        self._lines: Tick | None = None
        self._ending = contextlib.ExitStack()
        self.figures: Figures | None = None
        self.begun: Begin | None = None

    def on_figures(self, figures: Figures) -> None:
        """What turns steps into speeds."""
        self.figures = figures

    def say(self, text: str) -> None:
        """A line (or several) above what moves."""
        for line in text.splitlines():
            if self.live is not None:
                self.live.console.print(safe(line), style="dim", markup=False, highlight=False)
            else:
                note(safe(line))

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def on_begin(self, info: Begin) -> None:
        self.close()
        self.begun = info
        self.last.clear()
        if info.resumed is not None:
            self.say(f"going on from {info.resumed} (step {info.step})")
            if self._first_progress() >= 1:
                self.say("this run is over: nothing is left to train; the result is measured and written once more")
        if self.figures is not None and self.figures.peak is not None:
            peak = self.figures.peak
            self.say(
                f"MFU is of {peak.flops * info.world / 1e12:.3g} TFLOP/s ({peak.source}), weights alone and with attention"
            )
        if info.config.compile:
            self.say("train.compile: the first step compiles the blocks, which takes a minute or so")
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=4, get_renderable=self._drawn)
            self.live.start()

    def on_step(self, report: StepReport) -> None:
        self.last.append(report)
        self.losses.append(report.loss)
        every = self.config.train.log_every
        if self.live is None and (report.step % every == 0 or report.progress >= 1):
            note(f"step {self._where(report)} {self._numbers(report)} eta {self._left(report)}", "")

    def on_evaluating(self, done: int, total: int) -> None:
        """Held-out rows take their time: a line below what moves, now and then one in a log."""
        if self.live is not None:
            began = time.monotonic() if self.judging is None else self.judging[2]
            self.judging = (done, total, began)
            return
        if self._lines is None:
            self._lines = self._ending.enter_context(progress("held out", "rows"))
        self._lines(done, total)

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self.judging = self._lines = None
        self._ending.close()
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        if told:
            self.held_out = f"held out at step {step}: {told}"
            self.say(self.held_out)

    def on_text(self, step: int, prompt: str, reply: str) -> None:
        self.say(f"  {prompt!r} -> {reply!r}")

    def on_note(self, text: str) -> None:
        self.say(text)

    def on_end(self, figures: Mapping[str, float]) -> None:
        self.close()
        if self.last:
            report = self.last[-1]
            from herd.train.throughput import duration

            steps = "1 step" if report.step == 1 else f"{report.step:,} steps"
            self.say(f"{steps}, {report.all_tokens:,} tokens in {duration(report.all_seconds)}")

    def _where(self, report: StepReport) -> str:
        steps = (self.config.train if self.begun is None else self.begun.config).budget.steps  # of this stage
        return f"{report.step}" if steps is None else f"{report.step}/{steps}"

    def _judged(self) -> str:
        from herd.train.throughput import duration

        if self.judging is None or not self.judging[0]:
            return "" if self.judging is None else "held out: the first rows ..."
        done, total, began = self.judging
        gone = time.monotonic() - began
        rate, left = done / max(gone, 1e-9), gone * (total - done) / done
        return f"held out: {done:,} of {total:,} rows, {rate:,.1f} rows/s, eta {duration(left)}"

    def _speeds(self) -> tuple[float, float | None, float | None]:
        seconds = sum(report.seconds for report in self.last)
        speed = sum(report.tokens for report in self.last) / max(seconds, 1e-9)
        if self.figures is None or self.figures.peak is None:
            return speed, None, None
        peak = self.figures.peak.flops * self.figures.world
        return speed, speed * self.figures.work.weights / peak, speed * self.figures.work.attention / peak

    def _numbers(self, report: StepReport) -> str:
        loss = sum(one.loss for one in self.last) / len(self.last)
        speed, mfu, attention = self._speeds()
        used = "" if mfu is None or attention is None else f" mfu {mfu:.1%} ({attention:.1%} with attention)"
        memory = f" {report.memory_bytes / 1e9:.2f} GB"
        return f"loss {loss:.4f} norm {report.norm:.3g} rate {report.rate:.2e} {speed:,.0f} tok/s{used}{memory}"

    def _left(self, report: StepReport) -> str:
        from herd.train.throughput import duration

        if report.progress <= 0:
            return "?"
        before = self.begun
        done = report.all_seconds - (before.seconds if before is not None else 0.0)
        gained = report.progress - self._first_progress()
        return duration(done * (1 - report.progress) / gained) if gained > 0 else "?"

    def _first_progress(self) -> float:
        if self.begun is None:
            return 0.0
        info = self.begun
        return info.config.budget.progress(info.step, info.seconds, info.tokens)

    def _drawn(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.last:
            return Group(Text(self._judged() or "the first step ...", style="dim"))
        report = self.last[-1]
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"step {self._where(report)}", style="bold"),
            ProgressBar(total=1.0, completed=report.progress, width=32),
            Text(f"{report.progress:.1%}", style="cyan"),
            Text(f"eta {self._left(report)}", style="dim"),
        )
        speed, mfu, attention = self._speeds()
        loss = sum(one.loss for one in self.last) / len(self.last)
        facts = Text()
        facts.append(f"loss {loss:.4f} ", style="bold green")
        facts.append(_curve(self.losses, 24) + "  ", style="green")
        facts.append(f"norm {report.norm:.3g}  rate {report.rate:.2e}")
        used = Text(f"{speed:,.0f} tok/s")
        if mfu is not None and attention is not None:
            used.append(f"  MFU {mfu:.1%} ({attention:.1%} with attention)")
        used.append(f"  memory {report.memory_bytes / 1e9:.2f} GB")
        used.append(f"  {time.strftime('%H:%M:%S')}", style="dim")
        rows = [head, facts, used]
        told = self._judged() or self.held_out
        if told:
            rows.append(Text(told, style="cyan"))
        return Group(*rows)


def _curve(values: list[float], width: int) -> str:
    """The values as a row of bars, each the mean of its share."""
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for value in means)
