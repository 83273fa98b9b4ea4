"""`herd data build`: tokenized shards, ahead of training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.completion import models
from herd.cli.console import note

if TYPE_CHECKING:
    from herd.data.build import Built
    from herd.data.tokenworker import Encoder

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd data build texts/ --model nano                 into the folder that training looks into
  herd data build chats.jsonl --model ./Llama-3.2-1B-Instruct --out shards
  herd data build texts/ --model ./tokenizer.model --part 3/16 --out /cluster/shards
  herd data build texts/ --model ./tokenizer.model --join --out /cluster/shards
  herd data build texts/ --model nano --check         read every byte that is there, build damaged files again
  herd data build /cluster/texts --model ./tokenizer.model --out /cluster/shards --ray auto

On a cluster without Ray, start the same command with --part 1/N to N/N on N machines that share the folder --out (a Slurm
array: --part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT); then --join once. The files are the same bytes as those of one
machine, with Ray, too.
"""

SHOWN = 8
"""Files that are listed one by one."""

ADDRESS = re.compile(r"auto|local|ray://\S+|[^/\s]+:\d+")
"""What Ray takes for an address: no path looks like that."""

KINDS = ("text", "messages", "sharegpt", "alpaca", "completion")


@click.command(epilog=EPILOG)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--model", required=True, shell_complete=models, metavar="NAME", help="Whose vocabulary: a model, its folder, or a "
              "tokenizer file.")  # fmt: skip
@click.option(
    "--format", "format_name", metavar="NAME", help="Prompt format of conversations, instead of the model's own."
)
@click.option("--kind", type=click.Choice(KINDS), help="What the rows are, instead of looking at each file.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Where shards go (default: "
              "herd's cache; data.shards names another folder in a run).")  # fmt: skip
@click.option("--bad", type=click.Choice(["stop", "skip"]), default="stop", help="Stop at the first bad row, or skip such rows, "
              "counted and named (default: stop).")  # fmt: skip
@click.option(
    "--processes", type=click.IntRange(min=1), metavar="N", help="Processes that tokenize (default: one per core)."
)
@click.option("--part", metavar="I/N", help="Build only the I-th of N parts: one machine of several.")
@click.option("--ray", "address", is_flag=False, flag_value="", metavar="[ADDRESS]", help="Build on the machines of a Ray "
              "cluster: auto, local, HOST:PORT or ray://HOST:PORT (default: RAY_ADDRESS, or one that runs here, or this "
              "machine).")  # fmt: skip
@click.option("--join", is_flag=True, help="Put parts together; nothing is tokenized, and what is missing is an error.")
@click.option("--check", is_flag=True, help="Read every byte of shards that are there; damaged ones are built again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with a line's facts for each file.")
def command(
    paths: tuple[str, ...],
    model: str,
    format_name: str | None,
    kind: str | None,
    out: Path | None,
    bad: str,
    processes: int | None,
    part: str | None,
    address: str | None,
    join: bool,
    check: bool,
    as_json: bool,
) -> None:
    """Tokenize the rows of PATH... (files, folders, globs) into shards that training maps into memory.

    Training does this by itself; ahead of it, it takes no GPU's time. What is there and unchanged is not built again, and a
    build that was stopped goes on. Nothing is lost: documents keep their borders, conversations their loss masks, rows their
    lines.
    """
    if join and part is not None:
        raise click.UsageError("--join puts all parts together: leave out --part")
    if address is not None and (join or part is not None):
        raise click.UsageError("--ray makes all parts and joins them: leave out --part and --join")
    if address and not ADDRESS.fullmatch(address):
        raise click.UsageError(
            f"--ray {address}: is no address (auto, local, HOST:PORT, ray://HOST:PORT): put paths before --ray"
        )
    from herd.cli.tokenizing import tokenizing
    from herd.data.build import Build, shards_folder
    from herd.data.cluster import build_on_ray
    from herd.data.files import find_files

    files: list[Any] = [(file, kind) for path in paths for file in find_files(path, note)]
    root, encoder = shards_folder() if out is None else out, _encoder(model, format_name)
    with tokenizing() as tick:
        common: dict[str, Any] = {"bad": bad, "processes": processes, "check": check, "tick": tick, "tell": note}
        if address is not None:
            built = build_on_ray(root, encoder, files, address=address or None, **common)
        else:
            built = Build(root, encoder, part=_part(part), joining=join, **common)(files)
    if len(built) < len(files):
        note(f"{len(files) - len(built):,} of {len(files):,} files are for other parts; --join in the end")
    if as_json:
        print(json.dumps({"files": [_facts(one) for one in built]}, ensure_ascii=False))
        return
    for one in built[:SHOWN] if len(built) > SHOWN + 2 else built:
        _show(one)
    if len(built) > SHOWN + 2:
        documents, tokens, made = (sum(getattr(one, key) for one in built) for key in ("documents", "tokens", "made"))
        rejected = sum(one.report.bad_count for one in built)
        counts = f"{documents:,} documents, {tokens:,} tokens, {made:,} shards new, {rejected:,} bad rows"
        print(f"... {len(built):,} files in all: {counts}")


def _encoder(model: str, format_name: str | None) -> Encoder:
    from herd.chat.base import BaseFormat
    from herd.chat.formats import detect, format_named
    from herd.checkpoint.resolve import resolve
    from herd.checkpoint.vocabulary import tokenizer_at
    from herd.data.tokenworker import Encoder

    tokenizer = tokenizer_at(resolve(model))
    format = detect(tokenizer) if format_name is None else format_named(format_name, tokenizer)
    return Encoder(tokenizer, None if isinstance(format, BaseFormat) else format)


def _part(text: str | None) -> Any:
    from herd.data.build import Part

    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{text!r}: write the part and how many there are, as in 3/16", param_hint="--part")
    return Part(int(match[1]), int(match[2]))


def _facts(one: Built) -> dict[str, Any]:
    return {
        "file": str(one.file),
        "kind": one.kind,
        "folder": str(one.folder),
        "shards": len(one.shards),
        "made": one.made,
        "missing": one.missing,
        "documents": one.documents,
        "tokens": one.tokens,
        "learned": one.learned,
        "bad": one.report.bad_count,
    }


def _show(one: Built) -> None:
    if one.missing:
        note(
            f"{one.file}: {one.made} shards made, {len(one.missing)} of {len(one.shards)} are for other parts; --join in the end"
        )
        return
    share = one.learned / max(1, one.tokens)
    new = f"{one.made} of {len(one.shards)} new" if one.made else "nothing new"
    print(f"{one.file}: {one.kind}, {one.documents:,} documents, {one.tokens:,} tokens, {share:.0%} learned, {new}")
    print(f"  {one.folder}")
    for row in one.report.bad[:5]:
        note(str(row))
    if one.report.bad_count > 5:
        note(f"{one.file}: {one.report.bad_count:,} rows in all were left out as bad")
    for what, count in sorted(one.report.changed.items()):
        note(f"{one.file}: {count:,} rows changed: {what}")
