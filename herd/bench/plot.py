"""A report as a picture: one bar per player and batch, with the spread and the limit. matplotlib is needed here only."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from herd.errors import ConfigError

__all__ = ["check_plot", "plot"]

COLOURS = {"herd": "#1f6f8b", "llama.cpp": "#c96f2c", "transformers": "#8a8a8a"}


def check_plot(file: Path) -> None:
    """Raise ConfigError, before any measuring, when `file` could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'herd[plot]'")
    if file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{file}: a plot is a .png, .svg or .pdf file")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.absolute().parent}")


def plot(report: dict[str, Any], file: Path) -> None:
    """Draw tokens per second of every row into `file`; whiskers from the slowest to the fastest sample."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows, plan = report["rows"], report["plan"]
    labels = [
        f"{row['who']}\n{row['weights']}" + (f", {row['batch']}" if len(plan["batches"]) > 1 else "") for row in rows
    ]
    middles = [row["tokens_per_s"] for row in rows]
    below = [row["tokens_per_s"] - row["min"] for row in rows]
    above = [row["max"] - row["tokens_per_s"] for row in rows]
    figure = Figure(figsize=(max(5.0, 1.1 * len(rows)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    places = list(range(len(rows)))
    bars = axes.bar(
        places,
        middles,
        yerr=[below, above],
        capsize=3,
        color=[COLOURS.get(row["who"], "#555555") for row in rows],
    )
    axes.bar_label(bars, [f"{row['tokens_per_s']:.3g}\n{row['share']:.0%}" for row in rows], padding=2, fontsize=8)
    axes.set_xticks(places, labels, fontsize=8)
    axes.margins(y=0.15)
    axes.set_ylabel("tokens per second; share of the limit")
    axes.set_title(
        f"{plan['task']}: {plan['model']}, {plan['threads']} threads, {report['machine']['cpu']}", fontsize=9
    )
    figure.savefig(file, dpi=150)
