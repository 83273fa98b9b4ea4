"""Runs as curves: read from their logs, drawn with dots of Braille in a terminal or with matplotlib as a picture. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from herd.errors import ConfigError

__all__ = ["CURVES", "Axis", "Curve", "Run", "braille", "picture", "read_run", "smooth"]

Axis = Literal["steps", "tokens", "time"]
CURVES = {
    "loss": "loss (nats a token)",
    "bits_per_byte": "held-out bits per byte",
    "norm": "gradient norm",
    "rate": "learning rate",
    "speed": "tokens/s",
    "memory": "memory (GB)",
}
"""Name -> what stands over its picture."""
AXES = {"steps": "steps", "tokens": "tokens (millions)", "time": "minutes"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
"""Told apart with every kind of colour vision (Okabe and Ito, 2008)."""


@dataclass(slots=True)
class Curve:
    """Points (x, y), x rising."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: float, y: Any) -> None:
        """One more point, when `y` is a finite number."""
        if isinstance(y, (int, float)) and math.isfinite(y):
            self.x.append(x)
            self.y.append(float(y))


@dataclass(frozen=True, slots=True)
class Run:
    """A run's curves by name (CURVES), over one axis."""

    name: str
    axis: Axis
    curves: dict[str, Curve]

    def last(self, name: str) -> float | None:
        """The last value of a curve."""
        found = self.curves[name].y
        return found[-1] if found else None


def read_run(path: Path, axis: Axis = "steps") -> Run:
    """The curves of a run's folder (or its log file). Raises ConfigError when there is no log or nothing in it."""
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise ConfigError(f"{path}: there is no run (log.jsonl is missing)")
    curves = {name: Curve() for name in CURVES}
    at = 0.0
    seconds = 0.0
    for line in _lines(log):
        if line["event"] == "step":
            seconds = line.get("all_seconds", seconds)
            at = {"steps": line["step"], "tokens": line["all_tokens"] / 1e6, "time": seconds / 60}[axis]
            for name in ("loss", "norm", "rate"):
                curves[name].add(at, line.get(name))
            curves["speed"].add(at, line.get("tokens_per_second"))
            curves["memory"].add(at, line["memory_bytes"] / 1e9 if "memory_bytes" in line else None)
        elif line["event"] == "evaluation":
            curves["bits_per_byte"].add(at, line["figures"].get("bits_per_byte"))
    if not curves["loss"].x:
        raise ConfigError(f"{log}: no step is in it yet")
    return Run(path.resolve().name if path.is_dir() else path.resolve().parent.name, axis, curves)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values (fewer at the start): what it was about then, no look ahead."""
    made, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        made.append(total / min(i + 1, window))
    return made


def braille(
    runs: Sequence[Run],
    name: str,
    width: int = 72,
    height: int = 12,
    paint: Callable[[str, int], str] = lambda text, number: text,
) -> list[str]:
    """Lines of a terminal, `width` columns: the curve `name` of each run, with both axes. `paint(text, i)` colours the i-th run.

    Many points become means over what one dot stands for, so that noise does not fill the picture.
    """
    curves = [run.curves[name] for run in runs]
    if not any(curve.x for curve in curves):
        return []
    left, right = _span(runs)  # the same for every curve, so that they stand below each other
    columns = width - 10
    drawn = [_columns(curve, left, right, 2 * columns) for curve in curves]
    every = [y for points in drawn for _, y in points]
    low, high = _range(every)
    dots = [[(0, -1)] * columns for _ in range(height)]
    for number, points in enumerate(drawn):
        for x, y in _joined(points, low, high, 4 * height):
            row, column = y // 4, x // 2
            bits, _ = dots[row][column]
            dots[row][column] = (bits | _DOT[x % 2][y % 4], number)
    lines = [f"{CURVES[name]}"]
    for i, row in enumerate(dots):
        mark = _number(high - (high - low) * i / max(1, height - 1)) if i in (0, height // 2, height - 1) else ""
        body = "".join(paint(chr(0x2800 + bits), number) if bits else " " for bits, number in row)
        lines.append(f"{mark:>8} {'┤' if mark else '│'}{body}".rstrip())
    first, last = _number(left), f"{_number(right)} {AXES[runs[0].axis]}"
    lines.append(f"{'':>8} └{'─' * columns}")
    lines.append(f"{'':>10}{first}{last:>{max(1, columns - len(first))}}")
    return lines


def picture(runs: Sequence[Run], path: Path, title: str = "", names: Sequence[str] = tuple(CURVES)) -> None:
    """A PNG (or what the ending of `path` says) of the curves `names` that any run has.

    Raises ConfigError without matplotlib, and when no run has any.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError('a picture needs matplotlib: pip install "herd[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    shown = [name for name in names if any(run.curves[name].x for run in runs)]
    if not shown:
        raise ConfigError(f"{path}: there is no curve to draw: none of these runs has {' or '.join(names)}")
    across = 3 if len(shown) > 4 else 2
    down = -(-len(shown) // across)
    figure, places = pyplot.subplots(
        down, across, figsize=(4.6 * across, 3.3 * down), squeeze=False, layout="constrained"
    )
    flat = list(places.flat)
    for name, axes in zip(shown, flat, strict=False):
        for number, run in enumerate(runs):
            _draw(axes, run, name, COLOURS[number % len(COLOURS)])
        left, right = _span(runs)
        axes.set_xlim(left, right + 0.01 * (right - left) if right > left else left + 1)
        axes.set_title(CURVES[name], fontsize=10, loc="left")
        axes.set_xlabel(AXES[runs[0].axis], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "speed":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if name == "rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        if name in ("speed", "memory", "rate"):
            axes.set_ylim(bottom=0)
        if name in ("loss", "norm"):
            _cut(axes, runs, name)
    for axes in flat[len(shown) :]:
        axes.set_axis_off()
    if len(runs) > 1 or title:
        handles, labels = flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(runs)), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the picture cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def _draw(axes: Any, run: Run, name: str, colour: str) -> None:
    curve = run.curves[name]
    if name == "bits_per_byte":
        axes.plot(curve.x, curve.y, color=colour, marker="o", markersize=3.5, linewidth=1.2, label=run.name)
        return
    window = max(1, len(curve.y) // 50)
    noisy = window > 1 and name in ("loss", "norm", "speed")
    if noisy:
        axes.plot(curve.x, curve.y, color=colour, alpha=0.22, linewidth=0.7)
    axes.plot(curve.x, smooth(curve.y, window) if noisy else curve.y, color=colour, linewidth=1.5, label=run.name)


def _cut(axes: Any, runs: Sequence[Run], name: str) -> None:
    """Leave out what only the first steps reach: the rest of the curve is what is compared."""
    values = sorted(y for run in runs for y in run.curves[name].y)
    if len(values) < 40:
        return
    low, high = values[0], values[int(len(values) * 0.985)]
    if high == low:
        return
    axes.set_ylim(max(0.0, low - 0.05 * (high - low)), high + 0.08 * (high - low))


def _span(runs: Sequence[Run]) -> tuple[float, float]:
    """Where the runs begin and end."""
    steps = [run.curves["loss"].x for run in runs]
    return min(x[0] for x in steps), max(x[-1] for x in steps)


_DOT = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a Braille character by column and row of its dots (Unicode, block 2800)."""


def _columns(curve: Curve, left: float, right: float, count: int) -> list[tuple[int, float]]:
    """The mean of the points of each of `count` columns that has any."""
    sums: dict[int, tuple[float, int]] = {}
    for x, y in zip(curve.x, curve.y, strict=True):
        column = 0 if right == left else round((x - left) / (right - left) * (count - 1))
        total, number = sums.get(column, (0.0, 0))
        sums[column] = total + y, number + 1
    return [(column, total / number) for column, (total, number) in sorted(sums.items())]


def _joined(points: Sequence[tuple[int, float]], low: float, high: float, rows: int) -> Iterable[tuple[int, int]]:
    """Dots of the line through `points`, from the top."""
    before: tuple[int, int] | None = None
    for x, value in points:
        share = 0.5 if high == low else (value - low) / (high - low)
        y = round((1 - min(1.0, max(0.0, share))) * (rows - 1))
        if before is None:
            yield x, y
        else:
            steps = max(abs(x - before[0]), abs(y - before[1]), 1)
            for i in range(1, steps + 1):
                yield before[0] + round((x - before[0]) * i / steps), before[1] + round((y - before[1]) * i / steps)
        before = x, y


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - abs(low) * 0.05 - 1e-12, high + abs(high) * 0.05 + 1e-12
    return low, high


def _number(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size == 0 or size >= 0.01:
        return f"{value:.4g}"
    return f"{value:.1e}"


def _lines(log: Path) -> Iterable[dict[str, Any]]:
    import json

    with open(log, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                return
            if isinstance(line, dict) and "event" in line:
                yield line
