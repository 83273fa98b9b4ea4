"""The options that several commands share, and what is made of them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from herd.chat.params import SamplingParams
from herd.cli.conversation import stop_string
from herd.errors import ConfigError

if TYPE_CHECKING:
    from herd.cli.opened import Opened

__all__ = [
    "adapter_option",
    "context_option",
    "device_option",
    "dtype_option",
    "model_options",
    "opened_from",
    "sampling",
    "sampling_options",
    "tensor_parallel_option",
]

F = TypeVar("F", bound=Callable[..., Any])
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "stop")


device_option = click.option(
    "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (default: auto)."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Number type of the weights (default: auto).",
)


def context_option(text: str) -> Callable[[F], F]:
    """-c, with `text` as its help."""
    names = ("-c", "--ctx-size", "--max-model-len", "max_len")
    return click.option(*names, type=click.IntRange(min=2), metavar="N", help=text)


def model_options(command: F) -> F:
    """How a model is opened: --dtype, --weights, --device, -c, --format."""
    for add in (
        click.option("--format", "format_name", metavar="NAME", help="Prompt format, instead of the model's own."),
        context_option("Tokens of context (default: what the model was made for)."),
        device_option,
        click.option(
            "--weights",
            default="auto",
            metavar="FORM",
            help="Form of the matrices: auto (quantized files stay so), plain, stored, int8, int4, q4_k_m, ... (default: auto).",
        ),
        dtype_option,
    ):
        command = add(command)
    return command


def tensor_parallel_option(command: F) -> F:
    """--tensor-parallel-size: one model over several processes."""
    return click.option(
        "-tp",
        "--tensor-parallel-size",
        "tensor_parallel",
        type=click.IntRange(1, 1024),
        default=1,
        show_default=True,
        metavar="N",
        help="Processes of this machine that share the model: a GPU each, or a part of the cores.",
    )(command)


def adapter_option(command: F) -> F:
    """--adapter: an adapter for all replies."""
    return click.option(
        "--adapter",
        "--adapter-path",
        "adapter",
        type=click.Path(exists=True),
        metavar="PATH",
        help="An adapter on top of the model (LoRA, DoRA, prefix or prompt tuning): a PEFT folder or a GGUF file.",
    )(command)


def sampling_options(command: F) -> F:
    """How replies are sampled: one option per field of SamplingParams, named as in llama.cpp, Ollama, mlx and vLLM."""
    for add in (
        click.option("--stop", multiple=True, metavar="TEXT", help=r"End the reply before TEXT (repeatable; \n, \t)."),
        click.option("--seed", type=int, metavar="N", help="Same seed, same reply."),
        click.option(
            "-n",
            "--max-tokens",
            "max_tokens",
            type=int,
            metavar="N",
            help="Longest reply (default: what the context holds).",
        ),
        click.option(
            "--repeat-penalty",
            "--repetition-penalty",
            "repetition_penalty",
            type=float,
            metavar="X",
            help="Above 1: what was said becomes less likely.",
        ),
        click.option("--min-p", type=float, metavar="P", help="Least likelihood, as a share of the best token's."),
        click.option("--top-k", type=int, metavar="K", help="Choose among the K likeliest tokens (0: all)."),
        click.option("--top-p", type=float, metavar="P", help="Choose among the likeliest tokens that make up P."),
        click.option(
            "--temp", "--temperature", "temperature", type=float, metavar="T", help="0 is greedy; above, more varied."
        ),
    ):
        command = add(command)
    return command


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields that were given, checked. Raises click.UsageError (exit status 2) before any model is opened."""
    given = {name: options[name] for name in SAMPLING if options[name] not in (None, ())}
    if "stop" in given:
        given["stop"] = tuple(stop_string(text) for text in given["stop"])
    try:
        SamplingParams(**given)
    except ConfigError as error:
        raise click.UsageError(str(error), click.get_current_context(silent=True)) from None
    return given


def opened_from(model: str, options: Mapping[str, Any]) -> Opened:
    """The model of the command line, opened as --dtype, --weights, --device, -c, --format and --adapter say.

    Raises HerdError.
    """
    from herd.cli.console import silent_keys
    from herd.cli.progress import progress

    with silent_keys(), progress(f"loading {model}", "bytes") as tick:
        from herd.cli.opened import open_model

        given = {name: options[name] for name in ("dtype", "weights", "device", "max_len", "format_name")}
        ranks = options.get("tensor_parallel", 1)
        return open_model(model, **given, adapter=options.get("adapter"), tensor_parallel=ranks, tick=tick)
