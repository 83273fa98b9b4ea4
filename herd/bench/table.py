"""A report for people, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["headline", "tables"]

WIDTH = 80


def headline(machine: dict[str, Any]) -> str:
    """Hardware, versions, commit, command: what figures mean nothing without."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB"
        + (f", {' '.join(machine['instructions'])}" if machine["instructions"] else ""),
        f"Python {machine['python']}, herd {machine['herd']}"
        + (f" ({machine['commit']})" if machine["commit"] else "")
        + f", {versions}",
        f"{machine['date']}, {machine['command']}"
        + (f"; load average {load[0]} before, {machine.get('load_after', load)[0]} after" if load else ""),
    ]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def tables(report: dict[str, Any]) -> str:
    """Everything of `herd.bench.contest.contest`."""
    parts = [headline(report["machine"]), _subject(report["plan"])]
    for kind, limit in report["limits"].items():
        rows = [row for row in report["rows"] if _first(report["rows"], row) == kind]
        parts.append("\n".join([_limits(kind, limit), *_rows(rows, report["plan"]["task"])]))
    parts += list(_remarks(report))
    return "\n\n".join(parts)


def _first(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> str:
    """The type of herd's weights in the contest that `row` belongs to: herd's row comes first."""
    return next(r["weights"] for r in reversed(rows[: rows.index(row) + 1]) if r["who"] == "herd")


def _subject(plan: dict[str, Any]) -> str:
    weights = "random weights" if plan["random_weights"] else "its own weights"
    what = {
        "decode": f"decoding {plan['tokens']} tokens after {plan['prompt']}",
        "prefill": f"reading a prompt of {plan['prompt']} tokens",
        "batch": f"decoding {plan['tokens']} tokens after {plan['prompt']}, several sequences together",
    }[plan["task"]]
    line = (
        f"{plan['model']} ({plan['parameters'] / 1e9:.2f}B parameters, {weights}), {what}; {plan['threads']} threads, "
        f"medians of {plan['runs']} runs, in turn"
    )
    return textwrap.fill(line, WIDTH)


def _limits(kind: str, limit: dict[str, Any]) -> str:
    rates = limit["gop_per_s"]
    who, does = limit.get("device") or "The machine", "moves" if limit.get("device") else "reads"
    eight = f"fp8 at {rates['fp8']:.0f}, " if "fp8" in rates else ""
    line = (
        f"{kind}. {who} in the same rounds: {does} {limit['gb_per_s']:.1f} GB/s; multiplies int8 at "
        f"{rates['int8']:.0f}, {eight}bf16 at {rates['bfloat16']:.0f}, fp32 at {rates['float32']:.0f} GOP/s."
    )
    return textwrap.fill(line, WIDTH) + "\n"


def _rows(rows: Sequence[dict[str, Any]], task: str) -> Iterator[str]:
    read = task != "prefill"
    single = {row["who"] + row["weights"]: row["tokens_per_s"] for row in rows if row["batch"] == 1}
    yield (
        f"{'':<13}{'weights':<8}{'batch':>5}{'tok/s':>9}{'min':>8}{'max':>8}{'GB/s' if read else 'GOP/s':>8}{'share':>7}"
        f"{'herd is':>9}"
    )
    for row in rows:
        times = "" if row["times"] is None else f"{row['times']:.2f}x"
        if row["times"] is None and row["batch"] > 1 and row["who"] + row["weights"] in single:
            times = f"({row['tokens_per_s'] / single[row['who'] + row['weights']]:.1f}x 1)"
        rate = row["gb_per_s"] if read else row["gop_per_s"]
        yield (
            f"{row['who']:<13}{row['weights']:<8}{row['batch']:>5}{_number(row['tokens_per_s']):>9}{_number(row['min']):>8}"
            f"{_number(row['max']):>8}{_number(rate):>8}{row['share']:>7.2f}{times:>9}"
        )


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    lines = list(report["notes"])
    lines += [
        f"Goal, {row['weights']}{' x ' + str(row['batch']) if row['batch'] > 1 else ''}: {goal['what']} at least "
        f"{goal['least']}: {goal['found']:.2f}, {'met' if goal['met'] else 'not met'}."
        for row in report["rows"]
        for goal in row.get("goals", ())
    ]
    if any(one["who"] != "herd" for one in report["rows"]):
        lines.append(
            "Logits beside herd's: "
            + "; ".join(f"{one['who']} {one['weights']} cosine {one['cosine']:.4f}" for one in report["agreement"])
        )
    memory = {
        f"{row['who']} {row['weights']}": f"{row['resident_bytes'] / 1e9:.2f} GB ({row['file_bytes'] / 1e9:.2f} GB of weights)"
        for row in report["rows"]
        if row["resident_bytes"]
    }
    if memory:
        lines.append("Resident memory: " + "; ".join(f"{name} {size}" for name, size in memory.items()))
    busy = max((row["others"] or 0.0 for row in report["rows"]), default=0.0)
    if busy > 0.05:
        lines.append(
            f"Other programs took up to {busy:.0%} of the cores during samples: these figures are not those of a quiet machine."
        )
        rates = (f"{row['who']} {row['weights']} {_number(row['tokens_per_cpu_s'])}" for row in report["rows"])
        lines.append(f"Tokens per second of one core's CPU time: {'; '.join(rates)}.")
    aside = sum(len(row["set_aside"]) for row in report["rows"])
    if aside:
        lines.append(f"{aside} samples during which other programs ran were taken again; --json has them.")
    if lines:
        yield "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
