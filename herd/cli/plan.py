"""`herd plan`: what running a model takes, as tables or JSON. No torch."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import click

from herd.cli.columns import columns
from herd.cli.completion import models
from herd.cli.console import safe, styled

if TYPE_CHECKING:
    from herd.planning.plan import Plan

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd plan llama-3.1-8b                                    on this machine and on common devices
  herd plan llama-3.1-70b --device rtx4090 --context 32768  what fits, and which flags would make it fit
  herd plan llama-3.1-405b --device h100 --devices 8 --weights fp8 --batch 16 --price-per-hour 20
  herd plan ./model-Q4_K_M.gguf --device custom --memory 16 --bandwidth 300 --flops 40
  herd plan llama-3.3-70b --device h100 -tp 4               what each of four processes holds
  herd plan llama-4-maverick --json | jq .weights_bytes

\b
  herd plan train --model 405b --gpus 16384                 what training takes (herd plan train --help)
  herd plan fit RUNS...                                     a scaling law from small runs (herd plan fit --help)
"""


class _WithOthers(click.Command):
    """`herd plan MODEL`, and `herd plan train`, `herd plan fit`: a model of such a name is `./train`."""

    others: ClassVar = {"train": "herd.cli.plan_train", "fit": "herd.cli.plan_fit"}

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any):
        if args and args[0] in self.others:
            chosen: click.Command = import_module(self.others[args[0]]).command
            return chosen.make_context(f"{info_name} {args[0]}", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command(cls=_WithOthers, epilog=EPILOG)
@click.argument("model", shell_complete=models)
@click.option("--context", type=click.IntRange(min=1), metavar="N", help="Tokens per sequence (default: 8192).")
@click.option("--batch", type=click.IntRange(min=1), default=1, metavar="N", help="Sequences at once (default: 1).")
@click.option("--weights", metavar="TYPE", help="bf16, f16, f32, int8, fp8, int4, or a GGUF mix such as q4_k_m.")
@click.option("--kv", default="bf16", metavar="TYPE", help="Keys and values: bf16, int8, fp8, ... (default: bf16).")
@click.option("--device", metavar="NAME", help="cpu (this machine), h100, rtx4090, ..., or custom.")
@click.option("--devices", type=click.IntRange(min=1), default=1, metavar="N", help="How many of them (default: 1).")
@click.option(
    "-tp",
    "--tensor-parallel-size",
    "tensor_parallel",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Processes that share the model, a device each (default: 1).",
)
@click.option("--memory", type=float, metavar="GIB", help="Of a custom device, or instead of the device's own.")
@click.option("--bandwidth", type=float, metavar="GB/S", help="Memory bandwidth, likewise.")
@click.option("--flops", type=float, metavar="TFLOP/S", help="Dense 16-bit operations, likewise.")
@click.option("--prompt", type=click.IntRange(min=1), metavar="N", help="Tokens of the prompt (default: 1024).")
@click.option("--price-per-hour", type=click.FloatRange(min=0), metavar="X", help="Of all devices together.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object (docs/plan.md).")
def command(model: str, as_json: bool, **asked: Any) -> None:
    """Say what running MODEL takes: memory by part, speed, cost, what fits and what would make it fit.

    MODEL is a path (its headers are read) or any name of the catalog (nothing needs to be on this machine). Everything is
    arithmetic; what is assumed is said.
    """
    from herd.planning.plan import plan

    found = plan(model, **asked)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    else:
        click.echo(_text(found, asked))


def _text(plan: Plan, asked: dict[str, Any]) -> str:
    parts = [_head(plan), _memory(plan), _devices(plan), _advice(plan, asked), _savings(plan)]
    parts.append(_section("Assumptions", _listed(plan.assumptions)))
    return "\n\n".join(part for part in parts if part)


def _head(plan: Plan) -> str:
    setup, own = plan.setup, plan.setup.subject
    count = f"{own.parameters / 1e9:,.2f}B parameters"
    if own.active != own.parameters:
        count += f", {own.active / 1e9:,.2f}B active"
    weights = setup.weights.name if setup.weights else f"{own.stored_as} as stored"
    what = f"{weights} weights, {setup.kv.name} keys and values, context {setup.context:,}, batch {setup.batch:,}"
    return f"{styled(safe(own.name), 'bold', sys.stdout)}: {count}\n{what}"


def _memory(plan: Plan) -> str:
    setup, first = plan.setup, plan.first
    parts, config = setup.weight_bytes, setup.subject.config
    kv = setup.batch * setup.kv_sequence()
    if setup.ranks > 1:
        return _memory_each(plan)
    lines: list[tuple[str, int | None, str]] = [
        ("weights, layers", parts.layers + parts.norms, ""),
        ("weights, experts", parts.experts, ""),
        ("weights, embedding", parts.embedding, "tied: also the output" if config and config.tie_embeddings else ""),
        ("weights, output", parts.output, ""),
        ("weights, beside the decoder", parts.beside, "vision"),
    ]
    lines = [line for line in lines if line[1]]
    if setup.subject.decodes:
        each = setup.kv_per_token
        lines.append(("keys and values", None if each is None else kv, _kv_note(plan)))
    if config is not None:
        lines.append(("workspace", setup.workspace, "activations and logits"))
    lines.append(("runtime", first.runtime_bytes, "assumed"))
    total = f"weights {parts.total / 1e9:,.2f} GB" + (
        "" if kv or not setup.subject.decodes else ", without keys and values"
    )
    lines.append(("total", first.total_bytes, total))
    return columns([("MEMORY", "GIB", ""), *((name, _gib(value), note) for name, value, note in lines)], right=(1,))


def _memory_each(plan: Plan) -> str:
    """The same for several processes: all together, and the one that has most."""
    setup, first, share = plan.setup, plan.first, plan.setup.shares[0]
    all_parts, own, config = setup.weight_bytes, share.weights, setup.subject.config
    lines: list[tuple[str, int, int, str]] = [
        ("weights, layers", all_parts.layers + all_parts.norms, own.layers + own.norms, ""),
        ("weights, experts", all_parts.experts, own.experts, ""),
        ("weights, embedding", all_parts.embedding, own.embedding,
         "tied: also the output" if config and config.tie_embeddings else ""),
        ("weights, output", all_parts.output, own.output, ""),
        ("weights, beside the decoder", all_parts.beside, own.beside, "vision"),
    ]  # fmt: skip
    lines = [line for line in lines if line[1]]
    lines.append(("keys and values", setup.batch * setup.kv_sequence(), share.kv, _kv_note(plan)))
    lines.append(("workspace", setup.workspace, share.workspace, "activations and logits"))
    lines.append(("runtime", first.runtime_bytes, first.runtime_bytes // setup.ranks, "assumed"))
    lines.append(("total", first.total_bytes, first.each_bytes, f"weights {all_parts.total / 1e9:,.2f} GB"))
    rows = [(name, _gib(all_of_it), _gib(each), note) for name, all_of_it, each, note in lines]
    return columns([("MEMORY", "GIB", "EACH", f"of {setup.ranks} processes"), *rows], right=(1, 2))


def _kv_note(plan: Plan) -> str:
    setup = plan.setup
    each = setup.kv_per_token
    if each is None:
        return "unknown"
    said = f"{each / 1024:,.4g} KiB per token"
    freed = setup.batch * setup.kv_sequence(free_chunks=True)
    if freed < setup.batch * setup.kv_sequence():
        said += f"; {_gib(freed)} GiB if old chunks were freed"
    return said


def _devices(plan: Plan) -> str:
    own, priced = plan.setup.subject, plan.first.cost_input is not None
    head = ["DEVICE", "GIB", "FITS", "TOK/S", "PROMPT/S", "FIRST", "CONTEXT", "BATCH"]
    rows = [head + (["$/M IN", "$/M OUT"] if priced else [])]
    for fit in plan.fits:
        pace, device = fit.speed, fit.device
        row = [
            device.title,
            f"{device.memory * device.count / 2**30:,.1f}",
            "yes" if fit.fits else "no",
            _number(pace.decode_total) if fit.fits and own.decodes else "-",
            _number(pace.prefill) if fit.fits else "-",
            _seconds(pace.first_token) if fit.fits and own.decodes else "-",
            "-" if fit.largest_context is None else f"{fit.largest_context:,}",
            "-" if fit.largest_batch is None else f"{fit.largest_batch:,}",
        ]
        if priced:
            row += [_price(fit.cost_input), _price(fit.cost_output)] if fit.fits else ["-", "-"]
        rows.append(row)
    lines = [columns(rows, right=range(1, len(rows[0]))), *_device_notes(plan)]
    return "\n".join(lines)


def _device_notes(plan: Plan) -> list[str]:
    """What the columns mean, once; more about the device when only one was asked for."""
    own, setup = plan.setup.subject, plan.setup
    reading = f"FIRST: until the first reply token after a prompt of {setup.prompt:,}. " if own.decodes else ""
    largest = "CONTEXT, BATCH: the largest that fit." if own.config is not None else ""
    notes = [reading + largest] if reading or largest else []
    if len(plan.fits) == 1 and own.decodes:
        fit = plan.first
        pace = fit.speed
        limit = "reading memory" if pace.bound == "memory" else "arithmetic"
        decoding = "Decoding is" if fit.fits else "If it fitted, decoding would be"
        notes.append(
            f"{decoding} limited by {limit}: {_number(pace.decode)} tok/s for each sequence "
            f"({_number(pace.ceiling)} with a perfect program). Reading the weights stops being the limit "
            f"at a batch of {pace.crossover:,}."
        )
        notes.append(f"{fit.device.name}: {fit.device.source}.")
    return [_wrapped(note) for note in notes]


def _advice(plan: Plan, asked: dict[str, Any]) -> str:
    short = [fit for fit in plan.fits if not fit.fits]
    if len(plan.fits) > 1:
        rows = [(fit.device.title, fit.advice[0].flags, _gib(fit.advice[0].total)) for fit in short if fit.advice]
        return columns([("TO MAKE IT FIT", "ADD", "GIB"), *rows], right=(2,)) if rows else ""
    if not short:
        return ""
    if not short[0].advice:
        return f"Nothing that herd plan knows makes it fit on {short[0].device.title}."
    lines = [(_line(plan, asked, one.flags), _gib(one.total)) for one in short[0].advice]
    return columns([("TO MAKE IT FIT", "GIB"), *lines], right=(1,))


def _line(plan: Plan, asked: dict[str, Any], flags: str) -> str:
    """The command line that was given, with `flags` instead of the options that they replace."""
    words = flags.split()
    chosen = dict(zip(words[::2], words[1::2], strict=True))
    defaults = {"batch": 1, "kv": "bf16", "devices": 1, "tensor_parallel": 1}
    long = {"tensor_parallel": "--tensor-parallel-size"}
    given = {
        long.get(name, "--" + name.replace("_", "-")): f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in asked.items()
        if value is not None and value != defaults.get(name)
    }
    if "--context" in chosen and int(given.get("--prompt", "0")) > int(chosen["--context"]):
        chosen["--prompt"] = chosen["--context"]
    options = " ".join(f"{name} {shlex.quote(value)}" for name, value in (given | chosen).items())
    return f"herd plan {shlex.quote(plan.setup.subject.name)} {options}"


def _savings(plan: Plan) -> str:
    saved, setup = plan.savings, plan.setup
    if saved is None:
        return ""
    lines = []
    if saved.heads_per_kv > 1:
        kept = setup.batch * setup.kv_sequence()
        lines.append(
            f"Grouped queries: {saved.heads_per_kv} query heads share each key/value head. With one each, keys and values "
            f"would take {_gib(saved.mha_kv_bytes)} GiB instead of {_gib(kept)}, and the weights "
            f"{saved.mha_extra_parameters / 1e9:,.2f}B parameters more."
        )
    else:
        lines.append("Grouped queries: none. Every query head has its own keys and values.")
    extra = saved.vocabulary_parameters
    if extra:
        word = "more" if extra > 0 else "fewer"
        line = f"Vocabulary: {saved.vocabulary_size:,} tokens, {abs(extra) / 1e9:,.2f}B parameters {word} than 32,000 would take."
        if saved.tokens_for_the_same_text is not None:
            less = 1 - saved.tokens_for_the_same_text
            line += f" English text is {less:.0%} fewer tokens than with Llama 2's: less to compute and to keep."
        lines.append(line)
    return _section("What the design saves and costs", "\n".join(map(_wrapped, lines)))


def _section(title: str, body: str) -> str:
    return f"{styled(title, 'bold', sys.stdout)}\n{body}"


def _listed(items: Sequence[str]) -> str:
    return "\n".join(_wrapped(item, "- ", "  ") for item in items)


def _wrapped(text: str, first: str = "", later: str = "") -> str:
    width = max(40, min(shutil.get_terminal_size((100, 24)).columns, 120))
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=later)


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:,.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def _price(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value >= 0.01 else f"{value:.2g}"
