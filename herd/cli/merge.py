"""`herd merge`: an adapter added into its base model, with proof and what the rounding cost. No torch before it starts."""

from __future__ import annotations

import shlex
import sys

import click

from herd.cli.bars import stages
from herd.cli.verify import report_options, result_options, show

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd merge ./Llama-3.2-1B ./my-lora ./merged                       same format and types as the base
  herd merge ./Llama-3.2-1B ./my-lora merged.gguf --to gguf          one file for herd and llama.cpp
  herd merge ./Llama-3.2-1B ./my-lora q4.gguf --to gguf --quant q4_k_m
  herd merge base-q8.gguf ./my-lora merged-q8.gguf                   into quantized blocks: decoded, changed, encoded

ADAPTER is a PEFT folder (LoRA or DoRA) or a GGUF adapter. The sum is made in float32 and rounded once. The result is read back
and every tensor compared before it gets its name; the drift check runs base and adapter side by side against the result on a
text and refuses a mean KL divergence above --max-drift. To use an adapter without merging: herd run BASE --adapter ADAPTER.
"""


@click.command(epilog=EPILOG)
@click.argument("base")
@click.argument("adapter")
@click.argument("dst")
@click.option(
    "--to", "to", type=click.Choice(["meta", "hf", "gguf"]), help="The format to write (default: the base's)."
)
@click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="One type for all (default: as in the base).")
@click.option("--quant", metavar="TYPE", help="GGUF quantization of the result: q8_0, q6_k, q5_k_m, q4_k_m, q4_0, ...")
@click.option("--text", metavar="FILE", help="A UTF-8 text to measure the drift on (default: herd's sample).")
@click.option("--context", type=click.IntRange(4), help="Tokens of a window (512).")
@click.option("--windows", type=click.IntRange(1), help="Windows that are measured (16).")
@click.option("--max-drift", type=float, help="Nats of mean KL divergence that are too much (0.02).")
@click.option("--force", is_flag=True, help="Accept any drift; the report says so.")
@result_options
@report_options
def command(
    base: str,
    adapter: str,
    dst: str,
    to: str | None,
    dtype: str | None,
    quant: str | None,
    text: str | None,
    context: int | None,
    windows: int | None,
    max_drift: float | None,
    force: bool,
    overwrite: bool,
    keep_failed: bool,
    report_file: str | None,
    as_json: bool,
) -> int:
    """Write the model BASE with ADAPTER merged in to DST, and say what that cost."""
    from herd.convert.merge import MAX_DRIFT, merge
    from herd.convert.sample import Reading

    with stages() as watch:
        report = merge(
            base,
            adapter,
            dst,
            to=to,  # type: ignore[arg-type]
            dtype=dtype,
            quant=quant,
            reading=Reading(text, context, windows),
            max_drift=MAX_DRIFT if max_drift is None else max_drift,
            force=force,
            overwrite=overwrite,
            keep_failed=keep_failed,
            watch=watch,
            command=shlex.join(["herd", *sys.argv[1:]]),
        )
    return show(report, report_file, as_json)
