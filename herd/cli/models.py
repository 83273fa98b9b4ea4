"""`herd models`: the catalog as a table. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.columns import columns

if TYPE_CHECKING:
    from herd.model.release import Release

__all__ = ["Row", "command", "rows"]

EPILOG = """\
Examples:

\b
  herd models                     what herd can run
  herd models --all               also what it cannot run yet, and why
  herd models --json | jq -r '.[] | select(.path) | .name'    what is on this machine
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One model as it is listed. `path` is where its weights are on this machine; `why_not` says why it cannot be run."""

    name: str
    parameters: int | None
    context: int | None
    format: str | None
    variants: tuple[str, ...]
    names: tuple[str, ...]
    path: str | None
    why_not: str | None


@click.command(epilog=EPILOG)
@click.option("--all", "show_all", is_flag=True, help="Also models that herd cannot run yet, and why.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of all models, with everything that is known.")
def command(show_all: bool, as_json: bool) -> None:
    """List the Llama models that herd knows.

    The other commands take any of a model's names (NAME, TAG, and the Hugging Face and Meta names of --json), or the path of
    a folder or file. HERE is where its weights are on this machine.
    """
    listed = rows()
    if as_json:
        click.echo(json.dumps([_as_json(row) for row in listed], indent=1))
        return
    shown = [row for row in listed if show_all or row.why_not is None]
    click.echo(_table(shown))
    here = sum(row.path is not None for row in listed)
    hidden = len(listed) - len(shown)
    more = f" {hidden} more cannot be run yet: herd models --all says why." if hidden else ""
    click.echo(f"\n{here} of {len(listed)} are on this machine.{more}", err=True)
    if show_all:
        for row in shown:
            if row.why_not is not None:
                click.echo(f"{row.name}: {row.why_not}.", err=True)


def rows() -> list[Row]:
    """The embedded model, then the catalog in its order."""
    from herd.model.presets import RELEASES

    return [*_embedded(), *(_row(release) for release in RELEASES)]


def _row(release: Release) -> Row:
    return Row(
        release.id,
        release.total_params,
        release.max_context,
        release.chat_format,
        release.variants,
        (*release.tags, *release.hf_instruct, *release.hf_base, *release.native),
        _path(release.id),
        release.why_not,
    )


def _embedded() -> list[Row]:
    """The row of the model that comes with herd; none in an installation without it."""
    path = _path("nano")
    if path is None:
        return []
    config = json.loads((Path(path) / "config.json").read_text())
    with open(Path(path) / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    count = sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return [Row("nano", count, config["max_position_embeddings"], "llama3", ("chat",), ("herd-nano",), path, None)]


def _path(name: str) -> str | None:
    from herd.checkpoint.resolve import resolve
    from herd.errors import HerdError

    try:
        return str(resolve(name))
    except HerdError:
        return None


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "parameters": row.parameters,
        "context": row.context,
        "format": row.format,
        "variants": row.variants,
        "names": row.names,
        "path": row.path,
        "runnable": row.why_not is None,
        "why_not": row.why_not,
    }


def _table(listed: list[Row]) -> str:
    """Aligned columns; the path comes last, where its length does no harm."""
    head = ("NAME", "PARAMETERS", "CONTEXT", "FORMAT", "TAG", "HERE")
    body = [
        (
            row.name,
            _short(row.parameters, 1000),
            _short(row.context, 1024),
            row.format or "-",
            row.names[0] if row.names and ":" in row.names[0] else "-",
            row.path or ("-" if row.why_not is None else "cannot be run yet"),
        )
        for row in listed
    ]
    return columns([head, *body], right=(1, 2))


def _short(count: int | None, step: int) -> str:
    """1.24B, 405B; with step 1024 a context: 8K, 10M."""
    if count is None:
        return "?"
    power, letter = 0, ""
    for n, name in enumerate(("K", "M", "B") if step == 1000 else ("K", "M"), 1):
        if count >= step**n:
            power, letter = n, name
    return f"{count / step**power:.3g}{letter}"
