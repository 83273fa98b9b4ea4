"""`herd create`: a model by a name of one's own, from a Modelfile."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from herd.cli.console import note, safe

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd create librarian                        from ./Modelfile
  herd create librarian -f librarian.txt       from another file (-: standard input)
  herd create small -f Modelfile -q q4_k_m     with weights of its own, in 4 bits
  printf 'FROM nano\\nPARAMETER temperature 0\\n' | herd create calm -f -

\b
A Modelfile, as Ollama has them (docs/modelfile.md):
  FROM llama3.2:1b
  PARAMETER temperature 0.2
  SYSTEM You are a careful librarian.
"""


@click.command(epilog=EPILOG)
@click.argument("name")
@click.option("-f", "--file", "file", default="Modelfile", metavar="FILE", help="The Modelfile (default: ./Modelfile).")
@click.option(
    "-q", "--quantize", "quant", metavar="TYPE", help="Write the weights anew: q8_0, q4_k_m, ..., with proof."
)
@click.option("--overwrite", is_flag=True, help="Replace a model of that name.")
def command(name: str, file: str, quant: str | None, overwrite: bool) -> None:
    """Make the model NAME of a Modelfile: run, chat, generate, show, cp and rm then know it.

    The weights stay where they are; only with --quantize are they written anew. What the file says wrongly, or what herd does
    not have, is refused with its line.
    """
    from herd.cli.bars import stages
    from herd.convert.create import create

    text, folder = _read(file)
    with stages() as watch:
        made = create(
            name, text, folder, quant=quant, overwrite=overwrite, note=lambda line: note(safe(line)), watch=watch
        )
    click.echo(f"{made.name} is {safe(made.base)}: herd run {made.name}")


def _read(file: str) -> tuple[str, Path]:
    """The text of a Modelfile, and the folder that its relative paths begin in."""
    if file == "-":
        return sys.stdin.read(), Path.cwd()
    try:
        return Path(file).expanduser().read_text(encoding="utf-8"), Path(file).expanduser().absolute().parent
    except OSError as error:
        raise click.FileError(file, error.strerror or str(error)) from error
    except UnicodeDecodeError:
        raise click.FileError(file, "it is not UTF-8 text") from None
