"""`herd plan train`: layouts of a training run on a cluster, as a table or JSON, and the files that start it. No torch."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from herd.cli.columns import columns
from herd.cli.completion import models
from herd.cli.console import note, safe, styled

if TYPE_CHECKING:
    from herd.planning.train import TrainPlan
    from herd.planning.train_layout import Estimate

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd plan train --model 405b --gpus 16384 --gpu h100 --tokens 15.6T
  herd plan train --model llama-3.1-8b --gpus 8 --length 8192 --precision float8
  herd plan train --model 70b --gpus 256 --tokens 1T --slurm run.sbatch --config run.yaml
  herd plan train --compute 1e21                        which size and how many tokens are best for a budget
"""

COMMANDLINE = click.core.ParameterSource.COMMANDLINE
SHORT = {
    size: f"llama-{version}-{size}"
    for version, sizes in (("3.2", ("1b", "3b")), ("3.1", ("8b", "70b", "405b")))
    for size in sizes
}
"""Sizes that mean one Llama 3 to everybody."""


@click.command(epilog=EPILOG)
@click.option(
    "--model", shell_complete=models, metavar="MODEL", help="A name of the catalog (405b, llama-3.2-1b) or a path."
)
@click.option("--gpus", type=click.IntRange(min=1), default=8, metavar="N", help="How many (default: 8).")
@click.option("--gpu", default="h100", metavar="NAME", help="h100, h200, a100-80gb, ... (default: h100).")
@click.option("--tokens", metavar="N", help="Of the whole run, such as 15.6T, 300B: gives days and the budget.")
@click.option(
    "--length", type=click.IntRange(min=1), default=8192, metavar="N", help="Tokens of a row (default: 8192)."
)
@click.option("--batch", metavar="N", help="Tokens of a step, such as 16M (default: up to 16M).")
@click.option("--precision", type=click.Choice(["bfloat16", "float8"]), default="bfloat16", help="Default: bfloat16.")
@click.option(
    "--compute", type=click.FloatRange(min=1), metavar="FLOP", help="Only say which size and tokens suit a budget."
)
@click.option(
    "--slurm", type=click.Path(path_type=Path), metavar="FILE", help="Write a Slurm script of the best layout."
)
@click.option("--kuberay", type=click.Path(path_type=Path), metavar="FILE", help="Write a RayJob for KubeRay likewise.")
@click.option("--config", metavar="FILE", help="The config that those files name (default: run.yaml).")
@click.option("--image", metavar="NAME", help="The image of --kuberay (default: herd:latest).")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object (docs/train/planning.md).")
def command(
    model: str | None,
    gpus: int,
    gpu: str,
    tokens: str | None,
    length: int,
    batch: str | None,
    precision: str,
    compute: float | None,
    slurm: Path | None,
    kuberay: Path | None,
    config: str | None,
    image: str | None,
    as_json: bool,
) -> None:
    """Say how to train a model on many GPUs: memory, seconds of a step, MFU and days, the fastest layouts first.

    Everything is arithmetic with rates that were fitted to published runs (within 15 % of their time and 10 % of their memory);
    what is assumed is said.
    """
    from herd.errors import ConfigError
    from herd.planning.subject import subject
    from herd.planning.train import cluster_of, compute_optimal, enough, plan_train

    if model is None:
        _check_alone()
    if image is not None and kuberay is None:
        raise click.UsageError("--image is the one that --kuberay names: give both")
    if config is not None and slurm is None and kuberay is None:
        raise click.UsageError("--config is the one that --slurm and --kuberay name: give one of them, too")
    best = None
    if compute is not None:
        parameters, optimal = compute_optimal(compute)
        best = {"compute": compute, "parameters": parameters, "tokens": optimal}
        if not as_json:
            click.echo(
                f"{compute:.3g} operations: best spent on {_short(parameters)} parameters and {_short(optimal)} tokens"
            )
    if model is None:
        if as_json:
            click.echo(json.dumps(best))
        return
    own = subject(SHORT.get(model.lower(), model))
    if own.config is None:
        raise ConfigError(f"{own.name}: its geometry was never published, so there is nothing to plan")
    found = plan_train(
        own.name,
        own.config,
        cluster_of(gpu),
        gpus,
        length=length,
        batch=None if batch is None else round(_count(batch)),
        tokens=None if tokens is None else _count(tokens),
        precision=precision,  # pyright: ignore[reportArgumentType] (click has checked it)
    )
    told = found.as_dict() | ({} if best is None else {"best_for_compute": best})
    click.echo(json.dumps(told, indent=1) if as_json else _text(found))
    if not found.fits:
        _way_out(found, enough(found, None if batch is None else round(_count(batch)), precision))  # pyright: ignore[reportArgumentType]
    if slurm is not None or kuberay is not None:
        from herd.cli.plan_launch import write

        write(found, slurm, kuberay, config or "run.yaml", image or "herd:latest")


def _way_out(plan: TrainPlan, gpus: int | None) -> None:
    """What to do when nothing fits; `gpus` would be enough."""
    more = "with this --batch and --length no number of them can" if gpus is None else f"--gpus {gpus} is enough"
    note(
        f"{plan.gpus} x {plan.cluster.device.name} cannot train all weights of {plan.name}, which is what this plans: {more}. "
        "LoRA and QLoRA take less: herd train lora (or qlora) model.source=... data.sources=... --dry-run says how much",
        "yellow",
    )


def _check_alone() -> None:
    """Raise click.UsageError for options beside --compute that are about a model, when none is given."""
    context = click.get_current_context()
    given = {
        p.name: p.opts[0] for p in context.command.params if context.get_parameter_source(str(p.name)) is COMMANDLINE
    }
    if "compute" not in given:
        raise click.UsageError("give --model, or --compute alone")
    others = [option for name, option in given.items() if name not in ("compute", "as_json")]
    if others:
        raise click.UsageError(
            f"{', '.join(others)}: about a model, and none is named: give --model, or --compute alone"
        )


def _text(plan: TrainPlan) -> str:
    config = plan.config
    from herd.model.accounting import active_parameters, parameters

    total, active = parameters(config), active_parameters(config)
    size = f"{total / 1e9:,.2f}B parameters" + (f", {active / 1e9:,.2f}B active" if active != total else "")
    head = f"{styled(safe(plan.name), 'bold', sys.stdout)}: {size}\n"
    head += f"{plan.gpus:,} x {plan.cluster.device.name}, {_short(plan.batch)} tokens a step in rows of {plan.length:,}"
    parts = [head]
    if plan.fits:
        parts += [_table(plan, plan.fits[:8]), _detail(plan.fits[0])]
    elif plan.nearest is not None:
        parts += ["Nothing fits. The nearest:", _table(plan, (plan.nearest,)), _detail(plan.nearest)]
    if plan.budget is not None:
        parts.append(_budget(plan))
    said = "\n".join(_wrapped(item, "- ", "  ") for item in plan.assumptions)
    return "\n\n".join([*parts, f"{styled('Assumptions', 'bold', sys.stdout)}\n{said}"])


def _table(plan: TrainPlan, found: tuple[Estimate, ...]) -> str:
    """At most 80 columns: what is 1, or unknown, in every layout has none."""
    rows: list[dict[str, str]] = []
    for one in found:
        part, layout, run = one.layout.part, one.layout, plan.seconds(one)
        rows.append(
            {
                "DP": str(part.dp),
                "TP": str(part.tp),
                "CP": str(part.cp),
                "PP": f"{part.pp}" + (f"x{part.stages}" if part.stages > 1 else ""),
                "ROWS": f"{layout.rows}x{layout.microbatches}",
                "AGAIN": layout.checkpointing,
                "GIB": f"{one.memory.total / 2**30:,.1f}",
                "STEP": _seconds(one.time.total),
                "TOK/S": f"{one.tokens_per_second:,.0f}",
                "MFU": f"{one.mfu:.1%}",
                "FULL": f"{one.mfu_full:.1%}",
                "IDLE": f"{layout.bubble:.1%}",
                "RUN": "" if run is None else f"{run / 86400:,.1f}d",
            }
        )
    names = [name for name in rows[0] if not (name in ("CP", "RUN") and {row[name] for row in rows} <= {"", "1"})]
    return columns([names, *([row[name] for name in names] for row in rows)], right=range(len(names)))


def _detail(one: Estimate) -> str:
    memory = ", ".join(
        f"{name} {getattr(one.memory, name) / 2**30:,.1f}"
        for name in one.memory.__dataclass_fields__
        if getattr(one.memory, name) > 0
    )
    share = {name: getattr(one.time, name) / one.time.total for name in one.time.__dataclass_fields__}
    time = ", ".join(f"{name} {value:.0%}" for name, value in share.items() if value >= 0.005)
    return "\n".join(
        [
            _wrapped(
                "PP: ranks x stages. ROWS of a rank: in a micro-batch x micro-batches. AGAIN: blocks that are computed again for "
                "the backward pass (train.checkpointing). GIB, TOK/S: of a GPU. MFU counts what is not masked, FULL all of "
                "attention; both against the 16-bit peak. IDLE: the pipeline's bubble."
            ),
            _wrapped(f"GiB of the first: {memory}"),
            _wrapped(f"Time of the first: {time}"),
        ]
    )


def _budget(plan: TrainPlan) -> str:
    budget = plan.budget
    assert budget is not None
    word = "over-trained" if budget.ratio > 1.1 else "under-trained" if budget.ratio < 0.9 else "compute-optimal"
    lines = [
        f"{_short(budget.tokens)} tokens: {budget.compute:.3g} operations (6 N D), {word}: {budget.ratio:.2g} x the best number "
        "of tokens for them.",
        f"By Llama 3's law these operations are best spent on {_short(budget.optimal_parameters)} parameters and "
        f"{_short(budget.optimal_tokens)} tokens.",
    ]
    if plan.fits:
        seconds = plan.seconds(plan.fits[0])
        assert seconds is not None
        lines.append(
            f"The first layout takes {seconds / 86400:,.1f} days, {_short(seconds / 3600 * plan.gpus)} GPU hours."
        )
    return "\n".join(_wrapped(line) for line in lines)


def _wrapped(text: str, first: str = "", later: str = "") -> str:
    width = max(40, min(shutil.get_terminal_size((100, 24)).columns, 120))
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=later)


def _count(text: str) -> float:
    """A number as people write it: 15.6T, 300B, 16M, 4096."""
    powers = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    letter = text.strip().upper()[-1:]
    try:
        value = float(text.strip()[:-1]) * powers[letter] if letter in powers else float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise click.UsageError(f"{text!r} is no number of tokens: write 15.6T, 300B, 16M or 4096")
    return value


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f}s" if value < 100 else f"{value:,.0f}s"
