"""`herd verify`: two checkpoints held against each other. No torch before it starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.bars import stages
from herd.cli.console import coloured

if TYPE_CHECKING:
    from herd.convert.report import Report

__all__ = ["command", "reading_options", "report_options", "result_options", "show"]

EPILOG = """\
Examples:

\b
  herd verify ./Llama-3.2-1B ./llama-3.2-1b.gguf       is the file the model in the folder?
  herd verify ORIGINAL QUANTIZED --json | jq .passed
  herd verify A B --greedy 0                           without generating: reads each side twice
  herd verify lora/ lora.gguf --base MODEL             two LoRA adapters, by their factors and changes
  herd verify A B --quality --text my-text.txt         how much B lost: perplexity, KL divergence, errors of layers

Cost: A's weights are read about 18 times (2 and one per greedy token), B's 3 times, one layer in memory at a time; from 1 GiB
of weights on 4 greedy tokens are compared instead of 16.
"""


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--text, --context, --windows: what quality is measured on."""
    for option in (
        click.option("--windows", type=click.IntRange(1), help="Windows of the text that are measured (at most 16)."),
        click.option("--context", type=click.IntRange(4), help="Tokens of a window (512, or what the model takes)."),
        click.option("--text", metavar="FILE", help="The text to measure quality on, UTF-8 (default: herd's sample)."),
    ):
        command = option(command)
    return command


def result_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--overwrite and --keep-failed: what becomes of DST."""
    command = click.option("--keep-failed", is_flag=True, help="Keep a result that did not pass as DST.failed.")(
        command
    )
    return click.option("--overwrite", is_flag=True, help="Replace what is at DST, once the new result has passed.")(
        command
    )


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--report and --json: what `show` takes."""
    command = click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")(command)
    return click.option(
        "--report", "report_file", type=click.Path(dir_okay=False), help="Also write the JSON report to FILE."
    )(command)


@click.command(epilog=EPILOG)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--greedy", type=click.IntRange(0, 256), help="Greedy tokens to compare (16; 4 from 1 GiB on).")
@click.option("--quality", is_flag=True, help="Also say how much B lost, for any two models of one shape.")
@click.option("--base", metavar="MODEL", help="Of two LoRA adapters: the model they are for (default: what A names).")
@reading_options
@report_options
def command(
    a: str,
    b: str,
    greedy: int | None,
    quality: bool,
    base: str | None,
    text: str | None,
    context: int | None,
    windows: int | None,
    report_file: str | None,
    as_json: bool,
) -> int:
    """Prove that checkpoint B is checkpoint A, in any two formats.

    Every tensor must be equal, or lie in the bound of its type where B's is lower; tokenizer, prompts, logits and greedy tokens
    must agree. A is the original. The exit status is 0 only when everything passed.
    """
    from herd.convert.sample import Reading
    from herd.convert.verify import verify

    asked = quality or (text, context, windows) != (None, None, None)
    with stages() as watch:
        reading = Reading(text, context, windows) if asked else False
        report = verify(a, b, greedy=greedy, quality=reading, base=base, watch=watch)
    return show(report, report_file, as_json)


def show(report: Report, report_file: str | None, as_json: bool) -> int:
    """Print the report, write it to `report_file` when given; the exit status."""
    data = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
    if report_file is not None:
        try:
            Path(report_file).write_text(data + "\n", encoding="utf-8")
        except OSError as error:
            raise click.FileError(report_file, error.strerror or str(error)) from error
    if as_json:
        click.echo(data)
    elif coloured(sys.stdout):
        _table(report)
    else:
        click.echo(report.text(), nl=False)
    return 0 if report.passed else 1


def _table(report: Report) -> None:
    """The same in colours, with a table of the sides."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    verdict = Text(
        " PASS " if report.passed else " FAIL ", style="bold white on " + ("green" if report.passed else "red")
    )
    console.print(verdict, Text(report.title, style="bold"))
    table = Table(box=None, pad_edge=False)
    for head, right in (("", False), ("format", False), ("weights", True), ("bits/weight", True), ("path", False)):
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for name, side in (("A", report.a), ("B", report.b)):
        size = f"{side.weight_bytes:,} B"
        table.add_row(name, side.kind, size, f"{side.bits_per_weight:.2f}", Text(side.path))
    console.print(table)
    body = report.text().split("\n\n", 2)[2]
    for line in body.splitlines():
        style = "green" if line.startswith("  ok ") else "red bold" if line.startswith("  FAIL") else ""
        console.print(Text(line, style=style))
