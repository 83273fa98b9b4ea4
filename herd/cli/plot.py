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
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="A picture (png, svg, pdf) of all curves.")
@click.option("--title", default="", help="A line over the picture.")
@click.option("--json", "as_json", is_flag=True, help="The last value of every curve of every run, as JSON.")
def command(
    runs: tuple[Path, ...], axis: Axis, curves: str | None, out: Path | None, title: str, as_json: bool
) -> None:
    """Draw how each RUN (its folder) went, together."""
    read = [read_run(path, axis) for path in runs]
    if as_json:
        click.echo(
            json.dumps({str(path): {n: run.last(n) for n in CURVES} for path, run in zip(runs, read, strict=True)})
        )
        return
    if out is not None:
        picture(read, out, title)
        note(f"written: {out}")
        return
    wanted = [name.strip() for name in curves.split(",")] if curves else ["loss", "bits_per_byte", "speed"]
    for name in wanted:
        if name not in CURVES:
            raise click.BadParameter(f"{name!r} is no curve: choose of {', '.join(CURVES)}", param_hint="--curve")
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
