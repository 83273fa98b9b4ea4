"""`herd pull`: a model into the cache that all tools share. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.console import note, safe
from herd.cli.sizes import size

if TYPE_CHECKING:
    from herd.hub.plan import Plan
    from herd.hub.pull import Pulled

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd pull llama3.2:1b                              the tuned model of that name
  herd pull meta-llama/Llama-3.2-1B                  any repository of the hub
  herd pull ORG/NAME-GGUF:Q4_K_M                     one quantization of a GGUF repository
  herd pull meta-llama/Llama-3.2-1B --include 'original/*'   Meta's own files instead
  herd pull ORG/NAME --endpoint file:///mnt/mirror   a mirror; https:// and http:// work, too
  herd run "$(herd pull llama3.2:1b)" "Hi"           stdout is where the model lies
"""


@click.command(epilog=EPILOG)
@click.argument("name")
@click.option("--revision", metavar="REV", help="Branch, tag or commit (also NAME@REV; default: main).")
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Only files that match (repeatable), whatever they are."
)
@click.option("--quant", metavar="TYPE", help="Which GGUF file (also NAME:TYPE; default: Q4_K_M).")
@click.option("--token-file", type=click.Path(dir_okay=False, path_type=Path), help="Hub token (default: HF_TOKEN).")
@click.option("--endpoint", metavar="URL", help="Hub or mirror: https://, http:// or file:/// (default: HF_ENDPOINT).")
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Cache folder (default: HF_HUB_CACHE, HF_HOME)."
)
@click.option("--jobs", type=click.IntRange(1, 32), default=4, show_default=True, help="Files at once.")
@click.option(
    "--offline", is_flag=True, help="Only what is here; the network is never touched (also HF_HUB_OFFLINE=1)."
)
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded, and download nothing.")
@click.option("--json", "as_json", is_flag=True, help="The result as a JSON object.")
def command(
    name: str,
    revision: str | None,
    include: tuple[str, ...],
    quant: str | None,
    token_file: Path | None,
    endpoint: str | None,
    cache: Path | None,
    jobs: int,
    offline: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Download a model; stdout gets the path that the other commands take.

    What is in the cache already is not downloaded again, what was interrupted goes on, and everything is checked against the
    hub's digests. The cache is the one of the Hugging Face tools.

    Without --include, one copy of the model comes: its safetensors (or what herd reads best), configuration, tokenizer and
    licence. What is left out is said.
    """
    from herd.cli.downloads import downloads
    from herd.hub.plan import plan
    from herd.hub.pull import pulled
    from herd.hub.settings import settings

    where = settings(endpoint=endpoint, cache=cache, token_file=token_file, offline=True if offline else None)
    with downloads() as watch:
        if dry_run:
            _show_plan(plan(name, where, revision, include, quant, watch), as_json)
            return
        done = pulled(name, where, revision, include, quant, jobs, watch)
    _show(done, as_json)


def _show_plan(plan: Plan, as_json: bool) -> None:
    missing = {file.path for file in plan.missing}
    if as_json:
        files = [{"name": f.path, "bytes": f.size, "here": f.path not in missing} for f in plan.choice.files]
        said = _repository(plan.listing.repo, plan.listing.commit, plan.choice.quant)
        said |= {"files": files, "download_bytes": plan.bytes_left, "skipped": plan.choice.skipped}
        click.echo(json.dumps(said))
        return
    width = max(len(file.path) for file in plan.choice.files)
    for file in plan.choice.files:
        here = "" if file.path in missing else "  here"
        click.echo(f"{safe(file.path):<{width}}  {size(file.size or 0):>8}{here}")
    _say_skipped(plan.choice.skipped)
    note(f"{size(plan.bytes_left)} to download from {plan.where} into {plan.cache.folder}; nothing was downloaded")


def _show(done: Pulled, as_json: bool) -> None:
    if as_json:
        said = _repository(done.repo, done.commit, done.quant)
        said |= {"path": str(done.path), "snapshot": str(done.snapshot), "files": done.files}
        click.echo(json.dumps(said | {"downloaded_bytes": done.downloaded, "skipped": done.skipped}))
        return
    _say_skipped(done.skipped)
    what = f"{size(done.downloaded)} downloaded and checked" if done.downloaded else "everything was here already"
    note(f"{done.repo} at {done.commit[:12]}{f', {done.quant}' if done.quant else ''}: {len(done.files)} files, {what}")
    click.echo(str(done.path))


def _repository(repo: str, commit: str, quant: str | None) -> dict[str, Any]:
    return {"repo": repo, "commit": commit, "quant": quant}


def _say_skipped(skipped: tuple[str, ...]) -> None:
    for line in skipped:
        note(safe(f"not downloaded: {line}"))
