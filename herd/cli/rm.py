"""`herd rm`: a model out of the shared cache. No torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from herd.cli.completion import models
from herd.cli.console import is_terminal, note, safe
from herd.cli.sizes import size

if TYPE_CHECKING:
    from herd.hub.cache import RepoCache
    from herd.hub.created import Created
    from herd.hub.remove import Removal

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd rm meta-llama/Llama-3.2-1B             all of it, after a question
  herd rm meta-llama/Llama-3.2-1B@0123abcdef  one revision; what the others use stays
  herd rm ORG/NAME-GGUF:Q8_0 --yes            one quantization, without a question
  herd rm llama3.2:1b --dry-run               what would go
"""


@click.command(epilog=EPILOG)
@click.argument("name", shell_complete=models)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Cache folder (default: HF_HUB_CACHE, HF_HOME)."
)
@click.option("--json", "as_json", is_flag=True, help="What was (or would be) deleted, as a JSON object.")
def command(name: str, yes: bool, dry_run: bool, cache: Path | None, as_json: bool) -> int | None:
    """Delete a model from the Hugging Face cache, where herd pull puts it.

    Of a model of herd create, the name and what belongs to it alone. Contents that other revisions use stay. Models of Ollama,
    LM Studio and Meta's tool are read by herd, but never deleted.
    """
    from herd.hub.created import find
    from herd.hub.remove import removal, remove
    from herd.hub.settings import hub_cache

    if (made := find(name)) is not None:
        return _created(made, yes, dry_run, as_json)
    repo, revision, quant = _target(name, cache or hub_cache())
    what = removal(repo, revision, quant)
    if not as_json:
        _say(what, quant)
    if not dry_run:
        if not yes and not _sure():
            note("nothing was deleted")
            return 1
        remove(what)
    if as_json:
        said = {"repo": repo.repo, "commits": what.commits, "freed_bytes": what.freed, "deleted": not dry_run}
        click.echo(json.dumps(said | {"files": [str(path) for path in what.links]}))
    else:
        click.echo(f"{size(what.freed)} {'would be freed' if dry_run else 'freed'}")
    return None


def _created(model: Created, yes: bool, dry_run: bool, as_json: bool) -> int | None:
    """Delete a model of `herd create`: its manifest, and weights that are its own."""
    from herd.hub.created import manifest_of, own_weights, remove

    files = [path for path in (manifest_of(model.name), own_weights(model)) if path is not None]
    if not as_json:
        kept = "" if own_weights(model) is not None else f"; {model.base} stays"
        note(safe(f"{model.name}: {', '.join(map(str, files))}{kept}"))
    freed = sum(file.stat().st_size for file in files if file.exists())
    if not dry_run:
        if not yes and not _sure():
            note("nothing was deleted")
            return 1
        freed = remove(model)
    if as_json:
        said = {
            "name": model.name,
            "freed_bytes": freed,
            "deleted": not dry_run,
            "files": [str(file) for file in files],
        }
        click.echo(json.dumps(said))
    else:
        click.echo(f"{size(freed)} {'would be freed' if dry_run else 'freed'}")
    return None


def _target(name: str, cache: Path) -> tuple[RepoCache, str | None, str | None]:
    """The repository of `name` in the cache, with the revision and quantization it asks for. Raises HerdError."""
    from herd.errors import HubError, UnknownModelError
    from herd.hub.asked import asked
    from herd.hub.cache import RepoCache
    from herd.model.presets import wanted

    try:
        what = asked(name)
    except (HubError, UnknownModelError) as error:
        raise HubError(f"{_owner(name) or error}", cause="no_repo") from None
    repos = [what.repo]
    if what.note is not None:  # a name of the catalog that leaves the repository open
        repos = [known for known in wanted(name.partition("@")[0]).names if "/" in known]
    here = [held for known in repos if (held := RepoCache(cache, known)).folder.is_dir()]
    if not here:
        raise HubError(_owner(name) or f"{what.repo} is not in {cache}: herd list shows what is", cause="no_repo")
    return here[0], what.revision, what.quant


def _owner(name: str) -> str | None:
    """Who has to delete `name` when it is not in the cache."""
    from herd.hub import ollama
    from herd.hub.folders import lm_studio_models, meta_model

    if name in ("nano", "herd-nano"):
        return "nano comes with herd and goes with it"
    if ollama.find(name) is not None:
        return f"{name} belongs to Ollama: ollama rm {name} deletes it"
    if (place := next(lm_studio_models(name), None)) is not None:
        return f"{name} belongs to LM Studio, which deletes it under My Models; it is {place}"
    if (folder := meta_model(name)) is not None:
        return f"{name} belongs to Meta's tool: delete the folder {folder} yourself if nothing else uses it"
    return None


def _say(what: Removal, quant: str | None) -> None:
    part = "" if what.whole else f" ({quant})" if quant else f" at {what.commits[0][:12]}"
    note(safe(f"{what.repo.repo}{part} in {what.repo.folder}:"))
    for path in what.links:
        note(safe(f"  {path.relative_to(what.repo.folder)}"))
    unfinished = [blob for blob in what.blobs if blob.name.endswith(".incomplete")]
    if unfinished:
        note(f"  {len(unfinished)} unfinished downloads")


def _sure() -> bool:
    if not is_terminal(sys.stdin):
        raise click.UsageError("there is nobody to ask: --yes deletes without a question, --dry-run only shows")
    return click.confirm("Delete?", default=False, err=True)
