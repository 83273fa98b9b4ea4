"""`herd recipes`: what herd train knows by name, and copies of it to change. No torch."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import click

from herd.cli.console import note
from herd.errors import ConfigError

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd recipes                               the recipes
  herd recipes cp lora mine.yaml             the keys that matter, with comments; then: herd train mine.yaml
  herd recipes cp lora mine.yaml --all       every key there is, with what it means
  herd recipes cp pretrain mine.py --python  the recipe itself, about 100 lines; then: python mine.py CONFIG.yaml
  herd recipes keys optim                    every key with "optim" in it, its type and meaning
"""


@click.group(epilog=EPILOG, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the recipes of herd train, or copy one to change it."""
    if ctx.invoked_subcommand is None:
        _listed()


@command.command("list")
def listed() -> None:
    """List the recipes."""
    _listed()


command.add_command(listed, "ls")


def _listed() -> None:
    from herd.train.recipes.catalog import names, summary

    indent = 2 + max(len(name) for name in names())
    for name in names():
        click.echo(
            textwrap.fill(summary(name), _width(), initial_indent=name.ljust(indent), subsequent_indent=" " * indent)
        )


@command.command("cp")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--all", "every", is_flag=True, help="Every key, with its meaning as a comment.")
@click.option("--python", is_flag=True, help="The Python module instead: what the recipe does.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def copied(name: str, file: Path, every: bool, python: bool, force: bool) -> None:
    """Copy the recipe NAME into FILE."""
    from herd.train.recipes.catalog import recipe_file, recipe_module, recipe_text

    if file.exists() and not force:
        raise ConfigError(f"{file} is there already: choose another name, or write over it with --force")
    if every and python:
        raise click.UsageError("--all is for YAML and --python for the module: give one of them")
    recipe_file(name)
    if python:
        text = recipe_module(name).read_text(encoding="utf-8")
        then = f"python {file} CONFIG.yaml"
    else:
        text = _whole(name) if every else recipe_text(name)
        then = f"herd train {file}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
    note(f"written: {file}    run it: {then}")


def _whole(name: str) -> str:
    """Every key of a recipe. What it leaves to the user stands as an example."""
    from herd.train.overrides import dump_config, load_config
    from herd.train.recipes.catalog import recipe_file

    example = load_config(recipe_file(name), ["data.sources=YOUR-FILES"])
    return dump_config(example, comments=True)


@command.command("keys")
@click.argument("part", default="")
def keys(part: str) -> None:
    """List the keys of a configuration that have PART in their name, with type and meaning."""
    from herd.train.overrides import leaves

    found = [leaf for leaf in leaves() if part in leaf[0]]
    if not found:
        raise ConfigError(f"no key has {part!r} in its name: herd recipes keys lists all of them")
    for key, kind, text in found:
        click.echo(f"{click.style(key, bold=True)}  ({kind})")
        click.echo(textwrap.indent(textwrap.fill(text, _width() - 4), "    "))


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 110)
