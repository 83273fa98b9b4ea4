"""`herd plot`: how runs went, in the terminal or as a picture. No torch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import get_args

import click

from herd.cli.console import coloured, note, styled
from herd.train.plot import CURVES, Axis, braille, picture, read_run

__all__ = ["command"]

COLOURS = ("cyan", "yellow", "green", "red", "bold", "dim")

EPILOG = """\
Examples:

\b
  herd plot runs/a                        loss, held-out bits per byte and speed, here
  herd plot runs/a runs/b --by tokens     two runs beside each other
  herd plot runs/* --out runs.png         all curves as a picture (pip install "herd[plot]")
  herd plot runs/a --curve norm,rate
"""


@click.command(epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--by", "axis", type=click.Choice(get_args(Axis)), default="steps", help="What runs along the bottom.")
@click.option("--curve", "curves", metavar="NAME,...", help=f"Which curves: {', '.join(CURVES)}.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A picture (png, svg, pdf) of all curves, or of those of --curve.",
)
@click.option("--title", default="", help="A line over the picture.")
@click.option("--json", "as_json", is_flag=True, help="The last value of each curve of every run, as JSON.")
def command(
    runs: tuple[Path, ...], axis: Axis, curves: str | None, out: Path | None, title: str, as_json: bool
) -> None:
    """Draw how each RUN (its folder) went, together."""
    asked = [name.strip() for name in curves.split(",")] if curves else []
    for name in asked:
        if name not in CURVES:
            raise click.BadParameter(f"{name!r} is no curve: choose of {', '.join(CURVES)}", param_hint="--curve")
    if title and out is None:
        raise click.UsageError("--title stands over a picture: give --out, too")
    read = [read_run(path, axis) for path in runs]
    if none := [name for name in asked if not any(run.curves[name].x for run in read)]:
        note(f"{', '.join(none)}: none of these runs has it")
    if out is not None:
        picture(read, out, title, asked or tuple(CURVES))
        note(f"written: {out}")
    if as_json:
        last = {str(path): {n: run.last(n) for n in asked or CURVES} for path, run in zip(runs, read, strict=True)}
        click.echo(json.dumps(last))
    if as_json or out is not None:
        return
    wanted = asked or ["loss", "bits_per_byte", "speed"]
    width, height = shutil.get_terminal_size((90, 40))
    rows = max(6, min(14, (height - 4) // len(wanted) - 4))
    if len(read) > 1:
        told = (styled(f"━━ {run.name}", COLOURS[i % len(COLOURS)], sys.stdout) for i, run in enumerate(read))
        click.echo("   ".join(told))
    paint = (lambda text, i: styled(text, COLOURS[i % len(COLOURS)], sys.stdout)) if coloured(sys.stdout) else _plain
    for name in wanted:
        for line in braille(read, name, min(width, 110), rows, paint):
            click.echo(line)


def _plain(text: str, number: int) -> str:
    return text
