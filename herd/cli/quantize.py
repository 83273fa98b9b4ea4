"""`herd quantize`: a smaller copy of a model, with proof and a quality report. No torch before it starts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from herd.cli.bars import stages
from herd.cli.verify import reading_options, report_options, result_options, show

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd quantize ./Llama-3.2-1B llama-3.2-1b-q4.gguf                   q4_k_m: 4.9 bits a weight
  herd quantize ./Llama-3.2-1B small.gguf --to int4                   q4_0: runs fastest on a CPU
  herd quantize ./Llama-3.2-1B big.gguf --to q8_0 --text my-text.txt  measured on a text of yours
  herd quantize ./Llama-3.2-1B x.gguf --calibrate texts.txt           columns that matter are rounded with more care
  herd quantize ./Llama-3.2-1B x.gguf --report x.json --plot x.png

\b
TYPE     bits a weight (rows of whole blocks)
  q8_0 = int8  8.5     q6_k  6.6     q5_k_m  5.7     q5_k_s  5.5
  q4_k_m       4.9     q4_k_s 4.6    q4_0 = int4  4.5 (output q6_k)

The result is a GGUF file: herd, llama.cpp and what is built on it run it. It is read back and compared with the source before it
gets its name. The report runs both models on a text in float32, one layer in memory at a time: perplexity, KL
divergence, choices, errors of layers and matrices. On herd's own sample text (2,300 tokens) figures are for comparison only.
To quantize without a file: herd run MODEL --weights int8|int4|w8a8|fp8|q4_k_m|...
"""


@click.command(epilog=EPILOG)
@click.argument("model")
@click.argument("dst")
@click.option("--to", "to", default="q4_k_m", metavar="TYPE", help="q4_k_m (default), q8_0, q4_0, int8, int4, ...")
@reading_options
@click.option("--calibrate", metavar="FILE", help="A text that says which columns matter (an importance matrix).")
@click.option("--no-report", "no_report", is_flag=True, help="Leave the quality report out (the proof stays).")
@click.option(
    "--plot", "plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the errors (.png, .svg, .pdf)."
)
@click.option("--requantize", is_flag=True, help="Also from a source that is quantized already.")
@click.option("--shards", type=click.IntRange(1), help="Number of files; DST is then a folder.")
@click.option("--herd-only", is_flag=True, help="Also models that llama.cpp would run as another one.")
@result_options
@click.option("--greedy", type=click.IntRange(0, 256), help="Greedy tokens the proof compares (16; 4 from 1 GiB on).")
@report_options
def command(
    model: str,
    dst: str,
    to: str,
    text: str | None,
    context: int | None,
    windows: int | None,
    calibrate: str | None,
    no_report: bool,
    plot: Path | None,
    requantize: bool,
    shards: int | None,
    herd_only: bool,
    overwrite: bool,
    keep_failed: bool,
    greedy: int | None,
    report_file: str | None,
    as_json: bool,
) -> int:
    """Write MODEL quantized to the GGUF file DST, prove it, and say what was lost.

    MODEL is any name or path that herd opens.
    """
    if no_report and (text, context, windows, plot) != (None, None, None, None):
        raise click.UsageError("--no-report leaves out what --text, --context, --windows and --plot are about")
    if plot is not None:
        from herd.bench.plot import check_plot

        check_plot(plot)
    from herd.convert.quantize import quantize

    with stages() as watch:
        report = quantize(
            model,
            dst,
            to=to,
            report=not no_report,
            text=text,
            context=context,
            windows=windows,
            calibrate=calibrate,
            requantize=requantize,
            shards=shards,
            herd_only=herd_only,
            overwrite=overwrite,
            keep_failed=keep_failed,
            greedy=greedy,
            watch=watch,
            command=shlex.join(["herd", *sys.argv[1:]]),
        )
    if plot is not None and report.quality is not None:
        from herd.convert.plot import plot_quality

        plot_quality(report.quality, plot, f"{Path(model).name} as {to}")
    return show(report, report_file, as_json)
