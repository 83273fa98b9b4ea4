"""`herd doctor`: what this machine can run, and why something is slow."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from herd.cli.columns import columns
from herd.cli.console import safe, styled
from herd.planning.devices import GIB

if TYPE_CHECKING:
    from herd.bench.capacity import Capacity, Rates
    from herd.bench.checkup import Finding

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd doctor                  the machine, what slows it down, and what fits
  herd doctor --quick          nothing is measured: speeds are those of a common machine
  herd doctor --json | jq '.findings[] | select(.level != "good")'

The exit status is 1 when something is broken, and 0 otherwise.
"""

MARKS = {"good": ("ok", "green"), "note": ("note", "cyan"), "slow": ("slow", "yellow"), "broken": ("broken", "red")}


@click.command(epilog=EPILOG)
@click.option("--quick", is_flag=True, help="Measure nothing: the limits are assumed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: findings, limits, models.")
def command(quick: bool, as_json: bool) -> int:
    """Say what this machine can run, and why something is slow.

    Speeds of models are arithmetic over measured limits (herd bench measures whole models).
    """
    from herd.bench.capacity import capacities
    from herd.bench.checkup import checkup, rates
    from herd.cli.progress import progress
    from herd.hub.settings import hub_cache
    from herd.planning.devices import free_memory, this_machine

    with progress("looking at this machine", "checks") as tick:
        findings = checkup(hub_cache())
        tick(1, 2)
        threads = next(int(one.value.split()[0]) for one in findings if one.name == "threads")
        limits = None if quick else rates(threads)
        tick(2, 2)
    free = free_memory() or this_machine().memory
    models = capacities(free, limits)
    if as_json:
        said = {
            "findings": [asdict(one) for one in findings],
            "limits": None if limits is None else asdict(limits),
            "free_bytes": free,
            "models": [asdict(one) for one in models],
        }
        click.echo(json.dumps(said, indent=1))
    else:
        click.echo("\n\n".join([_findings(findings), _limits(limits, threads), _models(models, free)]))
    return 1 if any(one.level == "broken" for one in findings) else 0


def _findings(findings: list[Finding]) -> str:
    width = max(len(one.name) for one in findings)
    lines, area = [], ""
    for one in findings:
        if one.area != area:
            area = one.area
            lines += ["", styled(area.capitalize(), "bold", sys.stdout)]
        mark, colour = MARKS[one.level]
        lines.append(f"  {styled(f'{mark:<6}', colour, sys.stdout)}  {one.name:<{width}}  {safe(one.value)}")
        for text in (one.why, one.fix and f"Remedy: {one.fix}"):
            if text:
                indent = " " * (width + 12)
                lines += textwrap.wrap(safe(text), 100, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines[1:])


def _limits(limits: Rates | None, threads: int) -> str:
    if limits is None:
        return "Limits: assumed, not measured (herd plan says what is assumed)"
    read, half, whole = limits.bandwidth / 1e9, limits.bfloat16 / 1e9, limits.int8 / 1e9
    said = f"memory {read:.1f} GB/s, products {half:,.0f} GFLOP/s in bfloat16 and {whole:,.0f} GOP/s in int8"
    return f"Limits, measured with {threads} threads: {said}"


def _models(models: list[Capacity], free: int) -> str:
    head = ["MODEL"]
    for form in models[0].forms:
        head += [form.name.upper(), "TOK/S"]
    rows = [[*head, "ALSO"]]
    for one in models:
        row = [one.model]
        for form in one.forms:
            row += [f"{form.nbytes / GIB:,.1f} GiB", "too large" if form.decode is None else f"{form.decode:,.1f}"]
        rows.append([*row, _also(one.same)])
    longest = max(one.context for one in models)
    title = f"Models in {free / GIB:.1f} GiB of free memory, with a context of {longest:,} tokens or their own maximum"
    return f"{styled(title, 'bold', sys.stdout)}\n{columns(rows, right=range(1, len(head)))}"


def _also(names: tuple[str, ...]) -> str:
    return ", ".join(names[:1]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
