"""`herd cp`: a created model under another name. No torch."""

from __future__ import annotations

import click

from herd.cli.completion import models

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd cp librarian librarian:old
  herd cp nano storyteller          any model: a name for it, without a copy of its weights
"""


@click.command(epilog=EPILOG)
@click.argument("source", shell_complete=models)
@click.argument("name")
@click.option("--overwrite", is_flag=True, help="Replace a model of that name.")
def command(source: str, name: str, overwrite: bool) -> None:
    """Call the model SOURCE also NAME. Weights are shared, never copied."""
    from pathlib import Path

    from herd.checkpoint.resolve import resolve
    from herd.hub.created import Created, copy, find

    known = find(source)
    if known is None:
        path = resolve(source)
        known = Created(source, str(path.absolute()) if Path(source).expanduser().exists() else source)
    made = copy(known, name, overwrite=overwrite)
    click.echo(f"{made.name} is {known.base}")
