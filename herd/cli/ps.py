"""`herd ps`: the models that a server has loaded. No torch."""

from __future__ import annotations

import datetime
import json
from typing import Any

import click

from herd.cli.columns import columns
from herd.cli.console import note, safe
from herd.cli.endpoint import Endpoint, key_option, url_option
from herd.cli.sizes import size

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd ps                                   of the server on this machine
  herd ps --url http://gpu-box:8000 --json
"""


@click.command(epilog=EPILOG)
@url_option
@key_option
@click.option("--json", "as_json", is_flag=True, help="A JSON list; sizes in bytes.")
def command(url: str, api_key: str | None, as_json: bool) -> None:
    """List the models that a server has loaded: the memory that each takes, measured, and when it will be unloaded."""
    rows = Endpoint(url, api_key).ask("GET", "/api/ps")["models"]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        note("no model is loaded")
        return
    table = [("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL")]
    table += [
        (
            safe(str(row["name"])),
            str(row.get("digest") or "-")[:12],
            size(row["size"]) if row.get("size") else "-",
            _processor(row),
            f"{row['context_length']:,}" if row.get("context_length") else "-",
            _until(row),
        )
        for row in rows
    ]
    click.echo(columns(table, right={2, 4}))


def _processor(row: dict[str, Any]) -> str:
    """Where the memory is, as Ollama says it."""
    whole, there = row.get("size") or 0, row.get("size_vram") or 0
    share = round(100 * there / whole) if whole else 0
    return "100% CPU" if share == 0 else "100% GPU" if share == 100 else f"{100 - share}%/{share}% CPU/GPU"


def _until(row: dict[str, Any]) -> str:
    if row.get("state", "ready") != "ready":
        return str(row["state"])
    try:
        moment = datetime.datetime.fromisoformat(row["expires_at"])
    except (KeyError, TypeError, ValueError):
        return "-"
    if moment.year >= 9999:
        return "Forever"
    left = (moment - datetime.datetime.now(datetime.UTC)).total_seconds()
    for seconds, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if left >= seconds:
            count = round(left / seconds)
            return f"{count} {unit}{'s' if count > 1 else ''} from now"
    return f"{max(round(left), 0)} seconds from now"
