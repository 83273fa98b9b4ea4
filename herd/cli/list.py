"""`herd list`: the models on this machine, wherever they came from. No torch."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.columns import columns
from herd.cli.console import note, safe
from herd.cli.sizes import size

if TYPE_CHECKING:
    from herd.hub.found import Found

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd list
  herd list --json | jq -r '.[] | select(.format == "gguf") | .path'
"""

PLACES = {
    "hub": "Hugging Face cache",
    "ollama": "Ollama",
    "lmstudio": "LM Studio",
    "meta": "Meta",
    "herd": "herd",
    "created": "herd create",
}


@click.command(epilog=EPILOG)
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Cache folder (default: HF_HUB_CACHE, HF_HOME)."
)
@click.option("--json", "as_json", is_flag=True, help="A JSON list with paths, sizes in bytes and problems.")
def command(cache: Path | None, as_json: bool) -> None:
    """List the models on this machine: what herd pull and the Hugging Face tools downloaded, and what Ollama, LM Studio and
    Meta's own tool have. All of them are read where they are.
    """
    from herd.hub.found import found
    from herd.hub.settings import hub_cache

    where = cache or hub_cache()
    models = [*_embedded(), *found(where)]
    if as_json:
        click.echo(json.dumps([as_dict(model) for model in models], indent=1))
        return
    rows = [("NAME", "FORMAT", "NUMBERS", "SIZE", "MODIFIED", "WHERE")]
    rows += [
        (
            safe(model.name),
            model.format or "-",
            safe(model.quant or "-"),
            size(model.size),
            _ago(model.modified),
            PLACES[model.where],
        )
        for model in models
    ]
    click.echo(columns(rows, right={3}))
    for model in models:
        if model.problem is not None:
            note(safe(f"{model.name}: {model.problem}"))
    note(f"{size(sum(model.size for model in models))} in all; the cache is {where}")


def as_dict(model: Found) -> dict[str, Any]:
    """`model` as JSON."""
    moment = datetime.datetime.fromtimestamp(model.modified, datetime.UTC).isoformat(timespec="seconds")
    return {
        "name": model.name,
        "path": str(model.path),
        "where": model.where,
        "format": model.format,
        "numbers": model.quant,
        "bytes": model.size,
        "modified": moment if model.modified else None,
        "revision": model.revision,
        "problem": model.problem,
    }


def _embedded() -> list[Found]:
    """The model that comes with herd."""
    from herd.checkpoint.resolve import resolve
    from herd.errors import HerdError
    from herd.hub.found import Found

    try:
        folder = resolve("herd-nano")
    except HerdError:
        return []
    files = [path for path in folder.iterdir() if path.is_file()]
    newest = max(path.stat().st_mtime for path in files)
    return [Found("nano", folder, "herd", "safetensors", None, sum(p.stat().st_size for p in files), newest)]


def _ago(moment: float) -> str:
    """How long ago, in the largest unit that fits."""
    if not moment:
        return "-"
    gone = max(time.time() - moment, 0)
    for seconds, unit in ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute")):
        if gone >= seconds:
            count = int(gone // seconds)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
