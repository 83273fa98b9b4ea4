"""`herd bench serve`: load on a server, herd's or another one. No torch in here."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from herd.cli.progress import progress

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd bench serve --model nano                              herd's own server, started for it
  herd bench serve --url http://127.0.0.1:8000 --concurrency 1,8,64
  herd bench serve --model nano --rate 2,4 --requests 100    requests at random moments, so many a second
  herd bench serve --model nano --concurrency 64 --seconds 60
  herd bench serve --model m.gguf --peer-url llama.cpp=http://127.0.0.1:8080 --plot load.png
  herd bench serve --url https://api.example --api-key KEY --dataset prompts.jsonl --ends
"""


class Loads(click.ParamType):
    """Numbers above 0 with commas between."""

    def __init__(self, kind: type[int] | type[float], most: float) -> None:
        self.kind, self.most = kind, most
        self.name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(dict.fromkeys(self.kind(word) for word in value.split(",")))
        except ValueError:
            found = ()
        if not found or not all(0 < number <= self.most for number in found):
            self.fail(f"{value!r} is not a list such as 1,8,64 of numbers up to {self.most:g}", param, ctx)
        return found


@click.command("serve", epilog=EPILOG)
@click.option("--url", metavar="URL", help="A server that runs. Without it, herd's own is started for --model.")
@click.option(
    "--model", metavar="MODEL", help="What to serve; with --url: its name there (default: the first one it lists)."
)
@click.option(
    "--serve-options", default="", metavar="TEXT", help='For herd\'s own server, such as "-np 64 --memory 2GiB".'
)
@click.option("--concurrency", type=Loads(int, 4096), help="Clients at once, each with one request (default: 1,8).")
@click.option("--rate", type=Loads(float, 1e5), help="Requests a second instead, at random moments (open loop).")
@click.option(
    "--requests", type=click.IntRange(1), metavar="N", help="Of each load (default: 4 for each client, at least 16)."
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), metavar="S", help="Send for so long instead.")
@click.option("--prompt-tokens", type=click.IntRange(1), metavar="N", help="Of each random prompt (default: 128).")
@click.option(
    "--output-tokens", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Of each reply."
)
@click.option(
    "--dataset",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts from a JSONL file (prompt or messages) or ShareGPT's JSON.",
)
@click.option("--ends", is_flag=True, help="Let replies end where the model ends them (default: ignore_eos).")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, metavar="T")
@click.option(
    "--peer-url", "peers", multiple=True, metavar="[NAME=]URL", help="Another server, sent the same (repeatable)."
)
@click.option("--api-key", envvar="HERD_BENCH_KEY", metavar="KEY", help="For --url.")
@click.option(
    "--timeout", type=click.FloatRange(1), default=600.0, show_default=True, metavar="S", help="For one request."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    metavar="N",
    help="Of prompts and moments (default: another one each time, since servers remember prompts).",
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the figures (.png, .svg, .pdf).")
@click.pass_context
def command(ctx: click.Context, as_json: bool, plot: Path | None, **given: Any) -> None:
    """Measure a server under load: throughput, time to first token and between tokens, percentiles, fairness, errors.

    Closed loop (--concurrency): every client sends its next request when the last was answered. Open loop (--rate): requests come
    whether or not the server keeps up, and waiting counts from the moment when one was due. Exits with 1 when a request failed.
    """
    _check(given)
    from herd.bench.load.report import load_plot, load_table
    from herd.bench.plot import check_plot
    from herd.cli.console import note

    if plot is not None:
        check_plot(plot)
    if given["seed"] is None:
        given["seed"] = random.randrange(2**31)
    report = _measured(given)
    click.echo(json.dumps(report, indent=1) if as_json else load_table(report))
    if plot is not None:
        load_plot(report, plot)
        note(f"drawn: {plot}")
    if any(row["failed"] for row in report["rows"]):
        ctx.exit(1)


def _check(given: dict[str, Any]) -> None:
    """Refuse what would be ignored."""
    if given["url"] is None and given["model"] is None:
        raise click.UsageError("name a server (--url) or a model to serve (--model)")
    if given["url"] is None and given["api_key"]:
        raise click.UsageError("--api-key is for --url: herd's own server wants none")
    if given["url"] is not None and given["serve_options"]:
        raise click.UsageError("--serve-options are for herd's own server: leave out --url or them")
    for one, other in (("concurrency", "rate"), ("requests", "seconds"), ("dataset", "prompt_tokens")):
        if given[one] is not None and given[other] is not None:
            first, second = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise click.UsageError(f"{first} and {second} do not go together")


def _measured(given: dict[str, Any]) -> dict[str, Any]:
    import shlex

    from herd.bench.load.client import Target
    from herd.bench.load.own import OwnServer
    from herd.bench.load.run import the_model
    from herd.bench.load.work import Work, read_dataset
    from herd.bench.machine import load_average, machine

    items = read_dataset(given["dataset"]) if given["dataset"] is not None else []
    peers = [_named(text) for text in given["peers"]]
    about, rows, notes = machine(), [], []
    with ExitStack() as stack:
        if given["url"] is None:
            own = stack.enter_context(OwnServer(given["model"], shlex.split(given["serve_options"])))
            servers = [("herd", own.target, "bench")]
        else:
            target = Target(given["url"], given["api_key"])
            servers = [("server", target, given["model"] or asyncio.run(the_model(target)))]
        servers += [(name, Target(url), asyncio.run(the_model(Target(url)))) for name, url in peers]
        shown = given["model"] or servers[0][2]
        shown = Path(shown).name if Path(shown).exists() else shown
        for who, target, model in servers:
            work = Work(
                model=model,
                prompt_tokens=given["prompt_tokens"] or 128,
                output_tokens=given["output_tokens"],
                items=items,
                ends=given["ends"],
                temperature=given["temperature"],
            )
            rows += asyncio.run(_levels(who, target, work, given))
    _compare(rows)
    about["load_after"] = load_average()
    if not all(row["counted_by_server"] for row in rows):
        notes.append("Where a server does not count its tokens, each piece of a stream counts as one.")
    notes += [
        f"{row['who']}, {row['clients'] if row['rate'] is None else row['rate']}: {count} times {error}"
        for row in rows
        for error, count in row["errors"].items()
    ]
    plan = {
        "model": shown,
        "prompt_tokens": None if items else given["prompt_tokens"] or 128,
        "output_tokens": given["output_tokens"],
        "dataset": None if given["dataset"] is None else given["dataset"].name,
        "prompts": len(items),
        "ends": given["ends"],
        "temperature": given["temperature"],
        "seed": given["seed"],
    }
    return {"machine": about, "plan": plan, "rows": rows, "notes": notes}


def _named(text: str) -> tuple[str, str]:
    """(name, URL) of a peer."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "/" not in name else (text, text)


async def _levels(who: str, target: Any, work: Any, given: dict[str, Any]) -> list[dict[str, Any]]:
    from herd.bench.load.run import Level, measure, warm_up

    await warm_up(target, work, given["timeout"])
    loads = (
        [(1, rate) for rate in given["rate"]] if given["rate"] else [(n, None) for n in given["concurrency"] or (1, 8)]
    )
    rows = []
    for number, (clients, rate) in enumerate(loads):
        requests = given["requests"]
        if requests is None and given["seconds"] is None:
            requests = max(16, 4 * clients) if rate is None else max(16, round(30 * rate))
        # Another seed for each load: a server that remembers prompts must not have seen these.
        level = Level(
            clients=clients,
            rate=rate,
            requests=requests,
            seconds=given["seconds"],
            seed=given["seed"] * 1000 + number,
            timeout=given["timeout"],
        )
        with progress(f"{who}, {f'{rate:g} a second' if rate else f'{clients} clients'}", unit="requests") as tick:
            found = await measure(target, work, level, lambda done, total: tick(done, total or done + 1))
        rows.append({"who": who, "times": None, **found})
    return rows


def _compare(rows: list[dict[str, Any]]) -> None:
    """How many times a peer's throughput the first server has under the same load."""
    first = {(row["clients"], row["rate"]): row for row in rows if row["who"] == rows[0]["who"]}
    for row in rows:
        own = first[row["clients"], row["rate"]]
        if row is not own and row["output_tokens_per_s"]:
            row["times"] = round((own["output_tokens_per_s"] or 0.0) / row["output_tokens_per_s"], 2)
