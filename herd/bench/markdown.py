"""Reports as a section of a Markdown page whose other sections people wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["replaced", "section"]


def section(reports: Sequence[dict[str, Any]]) -> str:
    """The tables of several reports of `contest` and `cold_start`, each under its command, without a heading."""
    about = reports[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"Written by `{about['command']}`: {about['cpu']} ({', '.join(about['instructions'])}), {about['cores']} cores, "
        f"{about['memory_gib']:.0f} GiB; Python {about['python']}, {versions}; commit {about['commit'] or 'unknown'}; "
        f"{about['date'][:10]}. Everybody has the same random weights and a process of their own, and they take turns. "
        "Medians of the samples, with the slowest and the fastest. Share: of the read bandwidth (decoding, bytes of weights, "
        "keys and values) or of the matrix-product peak (prompts), measured in the same rounds. The last column is herd's "
        "speed by the peer's. Tok/CPU s: tokens by the CPU time of all threads. Others: the most "
        "that other programs took of the cores during a sample."
    ]
    parts += [_part(report) for report in reports]
    return "\n\n".join(parts) + "\n"


def replaced(page: str, title: str, body: str) -> str:
    """`page` with the section `## title` holding `body`: in its place, or as the last one when there is none yet."""
    new = f"## {title}\n\n{body.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(page) is None:
        return f"{page.rstrip()}\n\n{new}"
    return pattern.sub(lambda found: new if found.end() == len(page) else new + "\n", page, count=1)


def _part(report: dict[str, Any]) -> str:
    plan, about = report["plan"], report["machine"]
    what = {
        "decode": f"Decoding {plan['tokens']} tokens after {plan['prompt']}",
        "prefill": f"Reading a prompt of {plan['prompt']} tokens",
        "batch": f"Decoding {plan['tokens']} tokens after {plan['prompt']}, several sequences at once",
        "cold-start": f"Process start to first token, prompt of {plan['prompt']} tokens, files in the page cache",
    }[plan["task"]]
    lines = [
        f"{what}: {plan['model']}, {plan['threads']} threads, {plan['runs']} runs; load average {about['load'][0]} before, "
        f"{about['load_after'][0]} after."
        if about["load"]
        else f"{what}: {plan['model']}, {plan['threads']} threads, {plan['runs']} runs."
    ]
    for kind, limit in report.get("limits", {}).items():
        rates = limit["gop_per_s"]
        lines.append(
            f"The machine beside {kind}: reads {limit['gb_per_s']:.1f} GB/s, multiplies int8 at {rates['int8']:.0f}, bf16 at "
            f"{rates['bfloat16']:.0f}, fp32 at {rates['float32']:.0f} GOP/s."
        )
    return "\n".join([*lines, "", *(_cold(report) if plan["task"] == "cold-start" else _speed(report))])


def _speed(report: dict[str, Any]) -> list[str]:
    reads = report["plan"]["task"] != "prefill"
    several = len(report["plan"]["batches"]) > 1
    head = [
        "",
        "weights",
        *(["at once"] if several else []),
        "tok/s",
        "min, max",
        "tok/CPU s",
        "GB/s" if reads else "GOP/s",
        "share",
    ]
    rows = [[*head, "memory, GB", "others", "herd is"]]
    for row in report["rows"]:
        cells = [row["who"], row["weights"], *([str(row["batch"])] if several else []), f"{row['tokens_per_s']:.1f}"]
        cells += [f"{row['min']:.1f}, {row['max']:.1f}", f"{row['tokens_per_cpu_s']:.1f}"]
        cells += [f"{row['gb_per_s' if reads else 'gop_per_s']:.1f}"]
        cells += [f"{row['share']:.2f}", f"{row['resident_bytes'] / 1e9:.2f}" if row["resident_bytes"] else ""]
        cells += ["" if row["others"] is None else f"{row['others']:.0%}"]
        rows.append([*cells, "" if row["times"] is None else f"{row['times']:.2f}x"])
    return _table(rows)


def _cold(report: dict[str, Any]) -> list[str]:
    rows = [["", "weights", "seconds", "min, max", "imports", "load", "prompt and token", "others"]]
    for row in report["rows"]:
        parts = row["parts"]
        cells = [row["who"], row["weights"], f"{row['seconds']:.2f}", f"{row['min']:.2f}, {row['max']:.2f}"]
        cells += [f"{parts[name]:.2f}" for name in ("imports", "load", "prompt")]
        rows.append([*cells, "" if row["others"] is None else f"{row['others']:.0%}"])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
