"""Loads on servers as tables of 80 columns, and as a picture."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from herd.bench.table import WIDTH, headline

__all__ = ["load_plot", "load_table"]

COLOURS = ("#1f6f8b", "#c96f2c", "#8a8a8a", "#6a994e", "#7b2d8b")
SPREADS = (
    ("ttft", "first token", 1000.0),
    ("per_token", "per token", 1000.0),
    ("gaps", "between pieces", 1000.0),
    ("end_to_end", "whole reply", 1000.0),
)
"""Key, name and factor to milliseconds."""


def load_table(report: dict[str, Any]) -> str:
    """The report for people."""
    plan = report["plan"]
    asked = (
        f"{plan['prompts']} prompts of {plan['dataset']}, up to {plan['output_tokens']} tokens each"
        if plan["dataset"]
        else f"{plan['output_tokens']} tokens after {plan['prompt_tokens']} of random text"
    )
    ends = "replies end where the model ends them" if plan["ends"] else "replies do not end before that"
    parts = [
        headline(report["machine"]),
        textwrap.fill(f"{plan['model']}: {asked}; {ends}. Seed {plan['seed']}.", WIDTH),
    ]
    wide = max(len(row["who"]) for row in report["rows"]) + 2
    head = f"{'':<{wide}}{'load':>8}{'requests':>10}{'failed':>8}{'req/s':>8}{'tok/s':>9}{'fairness':>10}{'times':>7}"
    lines = [head]
    for row in report["rows"]:
        fair = "-" if row["fairness"] is None else f"{row['fairness']:.3f}"
        times = "" if row["times"] is None else f"{row['times']:.2f}x"
        lines.append(
            f"{row['who']:<{wide}}{_load(row):>8}{row['requests']:>10}{row['failed']:>8}{row['requests_per_s'] or 0:>8.2f}"
            f"{row['output_tokens_per_s'] or 0:>9.1f}{fair:>10}{times:>7}"
        )
    parts.append("\n".join(lines))
    spread = [f"{'milliseconds':<{wide}}{'load':>8}  {'':<16}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
    for row in report["rows"]:
        for key, name, factor in SPREADS:
            if row[key] is not None:
                values = "".join(f"{row[key][p] * factor:>10.1f}" for p in ("p50", "p90", "p99", "max"))
                spread.append(f"{row['who']:<{wide}}{_load(row):>8}  {name:<16}{values}")
    parts.append("\n".join(spread))
    parts += [textwrap.fill(note, WIDTH) for note in report["notes"]]
    return "\n\n".join(parts)


def _load(row: dict[str, Any]) -> str:
    return f"{row['rate']:g}/s" if row["rate"] is not None else str(row["clients"])


def load_plot(report: dict[str, Any], file: Path) -> None:
    """Draw throughput, time to first token and time per token over the load: medians, and up to p99 as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    speed, first, each = figure.subplots(1, 3)
    loads = list(dict.fromkeys(_load(row) for row in report["rows"]))
    for colour, who in zip(COLOURS * 8, dict.fromkeys(row["who"] for row in report["rows"]), strict=False):
        rows = [row for row in report["rows"] if row["who"] == who]
        places = [loads.index(_load(row)) for row in rows]
        speed.plot(places, [row["output_tokens_per_s"] for row in rows], "o-", color=colour, label=who)
        for axes, key in ((first, "ttft"), (each, "per_token")):
            known = [(place, row[key]) for place, row in zip(places, rows, strict=True) if row[key] is not None]
            if known:
                at = [place for place, _ in known]
                axes.plot(at, [found["p50"] * 1000 for _, found in known], "o-", color=colour)
                low, high = ([found[p] * 1000 for _, found in known] for p in ("p50", "p99"))
                axes.fill_between(at, low, high, color=colour, alpha=0.15)
    names = {speed: "output tokens per second", first: "ms to the first token", each: "ms per token after it"}
    for axes, name in names.items():
        axes.set_xticks(range(len(loads)), loads)
        axes.set_xlabel("clients at once" if "/s" not in loads[0] else "requests per second")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    speed.legend()
    figure.suptitle(f"{report['plan']['model']}, {report['machine']['cpu']}: median, band to p99", fontsize=10)
    figure.savefig(file, dpi=150)
