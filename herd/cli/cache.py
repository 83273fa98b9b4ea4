"""`herd cache`: the packed copies that make models start fast. No torch."""

from __future__ import annotations

import datetime
import json

import click

from herd.cli.columns import columns
from herd.cli.console import note, safe
from herd.cli.sizes import size
from herd.errors import CheckpointError

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd cache                                    what is kept, and for which files
  herd cache --rm model-q4_0-0123456789abcdef   delete one copy
  herd cache --clear                            delete them all
  HERD_PACKED=off herd run MODEL "Hi"           neither use nor make one
"""


@click.command(epilog=EPILOG)
@click.option("--rm", "names", multiple=True, metavar="NAME", help="Delete this copy (several: give it again).")
@click.option("--clear", is_flag=True, help="Delete all copies.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list with paths, sources, sizes and times.")
def command(names: tuple[str, ...], clear: bool, as_json: bool) -> None:
    """List or delete packed copies of quantized models.

    The first start of a quantized model on a CPU keeps its weights as the processor reads them, so that later starts take a
    fraction of the time and of the memory. Deleting a copy costs that time once more, and nothing else. HERD_PACKED names another
    folder or is off; HERD_PACKED_LIMIT is how much all copies may take (32 GiB).
    """
    from herd.checkpoint.packed import copies, folder, limit

    where = folder()
    if where is None:
        note("packed copies are switched off: HERD_PACKED")
        if as_json:
            click.echo("[]")
        return
    there = {copy.path.stem: copy for copy in copies(where)}
    if unknown := [name for name in names if name not in there]:
        raise CheckpointError(f"there is no packed copy {safe(unknown[0])[:200]}: herd cache lists them")
    gone = list(there.values()) if clear else [there[name] for name in dict.fromkeys(names)]
    for copy in gone:
        try:
            copy.path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot be deleted: {error.strerror or error}", path=copy.path) from error
    shown = gone if clear or names else list(there.values())
    if as_json:
        click.echo(json.dumps([{"name": c.path.stem, "path": str(c.path), "source": c.source, "bytes": c.size,
                                "used": datetime.datetime.fromtimestamp(c.used, datetime.UTC).isoformat(timespec="seconds"),
                                "deleted": bool(clear or names)} for c in shown], indent=1))  # fmt: skip
        return
    total = size(sum(copy.size for copy in shown))
    if clear or names:
        click.echo(f"{total} freed")
        return
    rows = [("NAME", "SIZE", "USED", "OF")]
    rows += [
        (safe(c.path.stem), size(c.size), f"{datetime.datetime.fromtimestamp(c.used):%Y-%m-%d %H:%M}", safe(c.source))
        for c in shown
    ]
    if shown:
        click.echo(columns(rows, right={1}))
    note(f"{total} of at most {size(limit())} in {where}")
