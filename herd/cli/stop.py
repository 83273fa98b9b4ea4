"""`herd stop`: unload a model of a server. No torch."""

from __future__ import annotations

import click

from herd.cli.endpoint import Endpoint, key_option, url_option
from herd.errors import UnknownModelError

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd stop nano        its memory is free when this returns
  herd stop --all
"""


@click.command(epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--all", "every", is_flag=True, help="All that are loaded.")
@url_option
@key_option
def command(model: str | None, every: bool, url: str, api_key: str | None) -> None:
    """Unload MODEL from a server. Replies on their way end first; it is loaded again when it is asked for."""
    if every == (model is not None):
        raise click.UsageError("say which MODEL, or --all")
    server = Endpoint(url, api_key)
    loaded = {row["name"] for row in server.ask("GET", "/api/ps")["models"]}
    for name in sorted(loaded) if model is None else [model]:
        server.ask("POST", "/api/generate", {"model": name, "keep_alive": 0, "stream": False})
        if name not in loaded and model is not None and f"{name}:latest" not in loaded:
            left = {row["name"] for row in server.ask("GET", "/api/ps")["models"]}
            if left == loaded:
                raise UnknownModelError(f"{name} is not loaded; loaded are {', '.join(sorted(loaded)) or 'none'}")
        click.echo(f"stopped {name}")
