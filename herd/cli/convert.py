"""`herd convert`: a checkpoint or an adapter in another format, with proof. No torch before it starts."""

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
  herd convert ./Llama-3.2-1B llama-3.2-1b.gguf --to gguf                 the same numbers, one file
  herd convert ./Llama-3.2-1B llama-3.2-1b-q4.gguf --to gguf --quant q4_k_m
  herd convert ~/.llama/checkpoints/Llama3.1-8B ./hf --to hf              from Meta's files
  herd convert ./hf ./meta --to meta --shards 8                           for 8 model-parallel ranks
  herd convert ./hf ./parts --to gguf --quant q8_0 --shards 4             parts/parts-00001-of-00004.gguf ...
  herd convert ./my-lora my-lora.gguf --to gguf --base ./Llama-3.2-1B     a LoRA adapter

The result is read back and compared with the source before it gets its name: every tensor, tokenizer, prompts, logits, greedy
tokens. There is no way to leave that out. It reads the source about 19 times and the result 5 times, one layer in memory at a
time (from 1 GiB of weights on 7 times: fewer greedy tokens). The report lies in the result as herd-report.json and .txt, for
a GGUF file beside it. Without a passing report there is no result, and the exit status is 1.
"""


@click.command(epilog=EPILOG)
@click.argument("src")
@click.argument("dst")
@click.option(
    "--to", "to", required=True, type=click.Choice(["meta", "hf", "gguf", "peft"]), help="The format to write."
)
@click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="One type for all (default: as stored).")
@click.option("--quant", metavar="TYPE", help="GGUF quantization: q8_0, q6_k, q5_k_m, q4_k_m, q4_0, ...")
@click.option("--shards", type=click.IntRange(1), help="Files (hf, gguf) or model-parallel ranks (meta).")
@click.option("--bin", "bin", is_flag=True, help="hf: pytorch_model.bin instead of safetensors.")
@click.option("--base", metavar="MODEL", help="Adapters: the model they belong to.")
@click.option("--herd-only", is_flag=True, help="gguf: also models that llama.cpp would run as another one.")
@result_options
@click.option("--greedy", type=click.IntRange(0, 256), help="Greedy tokens to compare (16; 4 from 1 GiB on).")
@report_options
def command(
    src: str,
    dst: str,
    to: str,
    dtype: str | None,
    quant: str | None,
    shards: int | None,
    bin: bool,
    base: str | None,
    herd_only: bool,
    overwrite: bool,
    keep_failed: bool,
    greedy: int | None,
    report_file: str | None,
    as_json: bool,
) -> int:
    """Write the checkpoint SRC to DST in another format, and prove that nothing was lost.

    SRC is any name or path that herd opens; DST a new folder (meta, hf, peft, GGUF in parts) or a new
    .gguf file.
    """
    from herd.convert.driver import convert

    with stages() as watch:
        report = convert(
            src,
            dst,
            to=to,  # type: ignore[arg-type]
            dtype=dtype,
            quant=quant,
            shards=shards,
            bin=bin,
            base=base,
            herd_only=herd_only,
            overwrite=overwrite,
            keep_failed=keep_failed,
            greedy=greedy,
            watch=watch,
            command=shlex.join(["herd", *sys.argv[1:]]),
        )
    return show(report, report_file, as_json)
