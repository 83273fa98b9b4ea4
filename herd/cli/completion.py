"""`herd completion`: what a shell needs to complete commands, options and model names. No torch."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

__all__ = ["command", "models"]

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_HERD_COMPLETE"

EPILOG = """\
Examples:

\b
  herd completion bash >> ~/.bashrc                               bash 4.4 or newer
  herd completion zsh >> ~/.zshrc
  herd completion fish > ~/.config/fish/completions/herd.fish
"""


@click.command(epilog=EPILOG)
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the script that lets SHELL complete herd's commands, options and the names of models that are here."""
    from herd.cli.main import herd

    kind = get_completion_class(shell)
    assert kind is not None, shell
    click.echo(kind(herd, {}, "herd", VARIABLE).source())


def models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Models on this machine whose names begin with `incomplete`; paths when it looks like one, or nothing else fits."""
    from herd.hub.found import found
    from herd.hub.settings import hub_cache

    paths = [CompletionItem(incomplete, type="file")]
    if incomplete.startswith((".", "/", "~")):
        return paths
    names = ["nano", *(model.name for model in found(hub_cache()) if model.problem is None)]
    items = [CompletionItem(name) for name in dict.fromkeys(names) if name.lower().startswith(incomplete.lower())]
    return items or paths
