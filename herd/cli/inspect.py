"""`herd inspect`: what is in a checkpoint, as a page or JSON. No torch."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import click

from herd.cli.columns import columns
from herd.cli.completion import models
from herd.cli.console import note, safe, styled

if TYPE_CHECKING:
    from herd.checkpoint.inspect import Inspection

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd inspect ./Llama-3.2-1B-Instruct        a folder: Hugging Face or Meta
  herd inspect model-Q4_K_M.gguf --tensors    every tensor with shape, type and size
  herd inspect llama3.2:1b                    a name, when the model is on this machine
  herd inspect MODEL --json | jq .suspicious  only what looks wrong
"""
_KINDS = {"hf": "Hugging Face", "meta": "Meta", "gguf": "GGUF"}
_SHOWN_FILES = 12
_SMALL = 1 << 16
_SHARD = re.compile(r"(?<=-)\d{5}(?=-of-)|(?<=consolidated\.)\d{2,3}(?=\.pth)")


@click.command(epilog=EPILOG)
@click.argument("model", shell_complete=models)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object (docs/inspect.md).")
def command(model: str, tensors: bool, as_json: bool) -> int:
    """Say what is in a checkpoint, from its headers and small files: nothing is loaded, nothing in it is run.

    MODEL is a folder, a file, or the name of a model that is on this machine. The exit status is 1 when herd cannot open it.
    """
    from herd.checkpoint.inspect import inspect

    found = inspect(model)
    if as_json:
        click.echo(json.dumps(found.as_dict(tensors=tensors), indent=1, default=str))
    else:
        click.echo(_text(found, tensors))
    if found.problem is not None:
        note(f"herd: {safe(found.problem)}", "red")
        return 1
    return 0


def _text(found: Inspection, tensors: bool) -> str:
    parts = [_head(found), _facts(found), _types(found), _roles(found), _files(found), _suspicious(found)]
    if tensors:
        rows = [("TENSOR", "SHAPE", "TYPE", "BYTES", "FILE")]
        rows += [
            (safe(t.name), "x".join(map(str, t.shape)), t.stored, f"{t.nbytes:,}", safe(t.file)) for t in found.tensors
        ]
        parts.append(columns(rows, right=(3,)))
    return "\n\n".join(part for part in parts if part)


def _head(found: Inspection) -> str:
    kind = _KINDS.get(found.kind, found.kind)
    return f"{styled(safe(found.what), 'bold', sys.stdout)}\n{kind}: {safe(found.path)}"


def _facts(found: Inspection) -> str:
    """Names and values, aligned, long values wrapped."""
    rows: list[tuple[str, str]] = []
    if found.config is not None:
        data = found.as_dict()
        rows.append(("parameters", _parameters(data)))
        rows += _geometry(data["config"])
    if found.foreign is not None:
        rows += [
            (key.replace("_", " "), safe(str(value)[:300]))
            for key, value in found.foreign.facts.items()
            if value is not None
        ]
    rows += _tokens(found)
    rows += _generation(found)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(_wrapped(value, name.ljust(width + 2), " " * (width + 2)) for name, value in rows)


def _parameters(data: dict[str, Any]) -> str:
    total, active = data["parameters"], data["active_parameters"]
    said = f"{total:,} ({_short(total)})"
    return said if active == total else f"{said}, {active:,} active ({_short(active)})"


def _geometry(config: dict[str, Any]) -> list[tuple[str, str]]:
    c = config
    rows = [
        ("layers", "; ".join(_layer(kind) for kind in c["layers"])),
        ("width", f"dim {c['dim']:,}, feed-forward {c['hidden_dim']:,}"),
        ("attention", f"{c['n_heads']} query heads, {c['n_kv_heads']} key/value heads of {c['head_dim']}"),
        (
            "vocabulary",
            f"{c['vocab_size']:,} rows, output {'tied to the embedding' if c['tie_embeddings'] else 'of its own'}",
        ),
        ("context", f"{c['max_seq_len']:,}"),
        ("positions", f"theta {c['rope_theta']:,.10g}{_scaling(c['rope_scaling'])}, norm epsilon {c['norm_eps']:g}"),
    ]
    if c["moe"]:
        moe = c["moe"]
        rows.append(
            (
                "experts",
                f"{moe['n_experts']}, {moe['top_k']} per token beside a shared one, width {moe['hidden_dim']:,}",
            )
        )
    if c["temper"]:
        rows.append(
            ("temperature", f"scale {c['temper']['attn_scale']:g} per {c['temper']['floor_scale']:,.10g} positions")
        )
    return rows


def _layer(kind: dict[str, Any]) -> str:
    chunk = f", chunk {kind['chunk']:,}" if kind["chunk"] else ""
    return f"{kind['count']} x {kind['placement']}{chunk}, {kind['feed_forward']}"


def _scaling(scaling: dict[str, Any] | None) -> str:
    if scaling is None:
        return ", not stretched"
    return (
        f", stretched by {scaling['factor']:g} from {scaling['original_max_seq_len']:,} "
        f"(low {scaling['low_freq_factor']:g}, high {scaling['high_freq_factor']:g})"
    )


def _tokens(found: Inspection) -> list[tuple[str, str]]:
    facts = found.tokenizer
    if facts is None:
        return [] if found.foreign is not None or found.config is None else [("tokenizer", "none")]
    if facts.family is None:
        return [("tokenizer", "cannot be used (see below)")]
    fits = ""
    if found.config is not None:
        fits = (
            ", fits" if facts.size == found.config.vocab_size else f", the model has {found.config.vocab_size:,} rows"
        )
    rows = [
        ("tokenizer", f"{facts.family}, {facts.size:,} tokens ({facts.special:,} special){fits}"),
        ("special ids", f"BOS {facts.bos}, EOS {facts.eos}, a reply stops at {', '.join(map(str, facts.stop))}"),
    ]
    where = ", ".join(facts.templates) or "no template"
    name = facts.chat_format or "unknown format"
    rows.append(
        ("chat format", f"{name} ({where}{', by the name of the release' if facts.format_from == 'catalog' else ''})")
    )
    return rows


def _generation(found: Inspection) -> list[tuple[str, str]]:
    own = found.generation
    if own is None:
        return []
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
    said = [f"{name} {getattr(own, name):g}" for name in names if getattr(own, name) is not None]
    return [("sampling", ", ".join(said) or "nothing said")]


def _types(found: Inspection) -> str:
    rows = [("TYPE", "TENSORS", "NUMBERS", "BYTES", "BITS EACH")]
    for name, (count, numbers, nbytes) in found.types.items():
        bits = f"{8 * nbytes / numbers:.4g}" if numbers else "-"
        rows.append((name, f"{count:,}", f"{numbers:,}", _bytes(nbytes), bits))
    if len(rows) == 1:
        return ""
    if len(rows) > 2:
        total = [sum(column) for column in zip(*found.types.values(), strict=True)]
        mix = f" ({found.mix})" if found.mix else ""
        rows.append(
            (
                f"total{mix}",
                f"{total[0]:,}",
                f"{total[1]:,}",
                _bytes(total[2]),
                f"{8 * total[2] / max(total[1], 1):.4g}",
            )
        )
    return columns(rows, right=(1, 2, 3, 4))


def _roles(found: Inspection) -> str:
    """Which parameters have which type, when more than the norms differ."""
    roles = found.roles
    matrices = {kind for role, kinds in roles.items() if "norm" not in role for kind in kinds}
    if found.config is None or len(matrices) < 2:
        return ""
    rows = [("PARAMETER", "TYPES")]
    rows += [(role, ", ".join(f"{kind} x {count}" for kind, count in kinds.items())) for role, kinds in roles.items()]
    return columns(rows)


def _files(found: Inspection) -> str:
    sizes: dict[str, list[int]] = {}
    for name, size in found.files.items():
        sizes.setdefault(_SHARD.sub("*", name), []).append(size)
    order = sorted(sizes, key=lambda name: -sum(sizes[name]))
    shown = [name for name in order[:_SHOWN_FILES] if sum(sizes[name]) >= _SMALL or name == order[0]]
    rows = [("FILE", "COUNT", "BYTES")]
    rows += [(safe(name), str(len(sizes[name])), _bytes(sum(sizes[name]))) for name in shown]
    if rest := [name for name in order if name not in shown]:
        rows.append(("others", str(sum(len(sizes[n]) for n in rest)), _bytes(sum(sum(sizes[n]) for n in rest))))
    return columns(rows, right=(1, 2)) if len(rows) > 1 else ""


def _suspicious(found: Inspection) -> str:
    if not found.findings:
        return "Nothing suspicious."
    lines = [_wrapped(f"{finding.code}: {safe(finding.text)}", "- ", "  ") for finding in found.findings]
    return "\n".join([styled("Look at this", "yellow", sys.stdout), *lines])


def _wrapped(text: str, first: str, later: str) -> str:
    width = max(40, min(shutil.get_terminal_size((100, 24)).columns, 120))
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


def _short(count: int) -> str:
    return f"{count / 1e9:.4g}B" if count >= 1e9 else f"{count / 1e6:.4g}M"
