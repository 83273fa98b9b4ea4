"""`herd bench`: how fast this machine runs a model, against its own limits and beside other programs. No torch in here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from herd.cli.console import note
from herd.cli.progress import progress

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd bench decode                                     Llama 3.2 1B, int4, random weights
  herd bench decode --weights int4,int8,bf16 --peers llama.cpp,transformers
  herd bench prefill --prompt 512 --weights int8        reading a long prompt
  herd bench batch --batch 1,2,4,8,16                   many replies at once
  herd bench cold-start --peers llama.cpp               process start to first token
  herd bench decode --model ./Llama-3.2-1B-Instruct     a checkpoint of your own, as it is
  herd bench decode --device cuda --model 8b --weights bf16,fp8,int8,int4
  herd bench decode --json --plot decode.png > decode.json
  herd bench tokenizer                                  text to tokens
  herd bench serve --model nano --concurrency 1,8,64    a server under load; herd bench serve --help
"""

TASKS = ("decode", "prefill", "batch", "cold-start", "tokenizer")
PROMPTS = {"decode": 128, "prefill": 512, "batch": 128, "cold-start": 32}
SPEED_ONLY = ("model", "weights", "threads", "device", "prompt", "tokens", "batch", "peers", "plot", "quiet", "cache")


class Numbers(click.ParamType):
    """Whole numbers above 0 with commas between."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        if not all(word.isdecimal() and 1 <= int(word) <= 1024 for word in words):
            self.fail(f"{value!r} is not a list such as 1,4,16 of numbers from 1 to 1024", param, ctx)
        return tuple(dict.fromkeys(map(int, words)))


class _Bench(click.Command):
    """`herd bench serve` is a command of its own: it measures servers and shares no option with the others."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["serve"]:
            from herd.cli.bench_serve import command as serve

            return serve.make_context(f"{info_name} serve", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command(cls=_Bench, epilog=EPILOG)
@click.argument("task", type=click.Choice(TASKS), metavar="[decode|prefill|batch|cold-start|tokenizer|serve]")
@click.option(
    "--model", metavar="SHAPE|PATH", help="Catalog name (random weights) or checkpoint (default: llama3.2:1b)."
)
@click.option("--weights", metavar="KINDS", help="int4, int8, bf16, q4_k_m, ...; several with commas (default: int4).")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1: where everybody runs (default: cpu).")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Default: all cores of this process.")
@click.option("--prompt", type=click.IntRange(1), metavar="N", help="Tokens of the prompt (128; prefill: 512).")
@click.option("--tokens", type=click.IntRange(1), metavar="N", help="Tokens decoded in each run (64).")
@click.option("--batch", type=Numbers(), help="Replies at once, for `batch` (1,2,4,8,16).")
@click.option("--runs", type=click.IntRange(1), metavar="N", help="Samples of each figure (default: 5).")
@click.option("--peers", metavar="NAMES", help="llama.cpp, transformers: measured beside herd when installed.")
@click.option(
    "--quiet", type=click.IntRange(1), metavar="N", help="Take a sample up to N times, until other programs are quiet."
)
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Folder for the files that are measured."
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, every sample included.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the figures (.png, .svg, .pdf).")
@click.option("--shared", type=click.Path(file_okay=False, path_type=Path), help="Folder with texts, for `tokenizer`.")
@click.pass_context
def command(ctx: click.Context, task: str, runs: int | None, as_json: bool, **given: Any) -> None:
    """Measure speed: decode, prefill, batch, cold-start, tokenizer or serve.

    Every figure comes with what the machine can do in the same run (read bandwidth, matrix products), with the spread and with
    what else was running. Peers run in processes of their own, on the same weights, threads and prompts, in turn with herd.
    Random weights are written once, into a cache folder.
    """
    _check(task, given)
    if task == "tokenizer":
        from herd.bench.tokenizer import tokenizer_bench, tokenizer_table

        with _progress() as say:
            report = tokenizer_bench(given["shared"], runs or 5, say)
        click.echo(json.dumps(report, indent=1) if as_json else tokenizer_table(report))
        return
    from herd.bench.contest import contest
    from herd.bench.plot import check_plot, plot
    from herd.bench.table import tables

    if given["plot"] is not None:
        check_plot(given["plot"])
    plan = _plan(task, runs or 5, given)
    with _progress() as say:
        if task == "cold-start":
            from herd.bench.cold import cold_start, cold_table

            report, shown = cold_start(plan, say), cold_table
        else:
            report, shown = contest(plan, say), tables
    click.echo(json.dumps(report, indent=1) if as_json else shown(report))
    if given["plot"] is not None:
        plot(report, given["plot"])
        note(f"drawn: {given['plot']}")


def _check(task: str, given: dict[str, Any]) -> None:
    """Refuse options that the task would ignore."""
    useless = {
        "prefill": ("tokens", "batch"),
        "decode": ("batch",),
        "batch": (),
        "cold-start": ("tokens", "batch", "plot", "device"),
        "tokenizer": SPEED_ONLY,
    }[task]
    names = [f"--{name}" for name in useless if given[name] is not None]
    if task != "tokenizer" and given["shared"] is not None:
        names.append("--shared")
    if names:
        raise click.UsageError(f"{', '.join(names)} {'say' if len(names) > 1 else 'says'} nothing to herd bench {task}")


def _plan(task: str, runs: int, given: dict[str, Any]) -> Any:
    from herd.bench.contest import Plan
    from herd.bench.material import cache_folder
    from herd.bench.subject import kind_of, subject

    device = given["device"] or "cpu"
    if device != "cpu":
        from herd.checkpoint.placement import device_named

        device = str(device_named(device))
    what = subject(given["model"] or "llama3.2:1b")
    words = given["weights"] or ("int4" if what.path is None else None)
    kinds = [None] if words is None else [kind_of(word.strip()) for word in words.split(",")]
    return Plan(
        task=task,  # type: ignore[arg-type]
        subject=what,
        kinds=list(dict.fromkeys(kinds)),
        threads=given["threads"] or _cores(),
        folder=given["cache"] or cache_folder(),
        prompt=given["prompt"] or PROMPTS[task],
        tokens=given["tokens"] or 64,
        batches=(given["batch"] or (1, 2, 4, 8, 16)) if task == "batch" else (1,),
        runs=runs,
        tries=given["quiet"] or 1,
        device=device,
        peers=[] if not given["peers"] else list(dict.fromkeys(p.strip() for p in given["peers"].split(","))),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """What is being done: bytes as a bar, rounds as lines."""
    shown = ""
    with progress("measuring") as tick:

        def say(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                note(what)
                shown = what
            if done < total:
                tick(done, total)

        yield say
