"""The options of `herd serve`. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from herd.cli.options import context_option, device_option, dtype_option, tensor_parallel_option

__all__ = ["REFUSED", "serve_options"]

F = TypeVar("F", bound=Callable[..., Any])

REFUSED = {
    "--pipeline-parallel-size": "layers are not split between devices: use --tensor-parallel-size",
    "--gpu-memory-utilization": "say the memory for keys and values in bytes: --memory '4 GiB'",
    "--max-num-batched-tokens": "use --step-tokens",
    "--enable-auto-tool-choice": "tools are always on for models that were trained with them: leave it out",
    "--tool-call-parser": "calls are read in every dialect of Llama: leave it out",
    "--max-lora-rank": "adapters of any rank are taken: leave it out",
    "--max-loras": "any number of adapters may be loaded: leave it out",
    "--speculative-config": "use --draft lookup, or --draft MODEL",
    "--enforce-eager": "use it with GPUs only; there is nothing to switch off on a CPU",
    "-ngl": "layers are not split between devices: use --device",
    "--n-gpu-layers": "layers are not split between devices: use --device",
    "-fa": "attention is always computed block by block: leave it out",
    "--mmproj": "vision models are not supported yet",
    "--jinja": "prompts are written by herd's own formats: leave it out, or name one with --chat-template",
    "-hf": "give the repository as MODEL: ORG/NAME:QUANT",
    "--fit": "the context is fitted to the memory already; -c and --memory change it",
}
"""Flags of other servers -> what to do instead."""

OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on."),
    click.option(
        "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N", help="0: any free one."
    ),
    click.option(
        "--api-key",
        "api_keys",
        multiple=True,
        envvar="HERD_API_KEY",
        metavar="KEY",
        help="Clients must send one of these (repeatable). Others see arguments of programs: prefer the file, or HERD_API_KEY.",
    ),
    click.option(
        "--api-key-file",
        envvar="HERD_API_KEY_FILE",
        metavar="FILE",
        help="API keys, one a line: KEY, NAME KEY, or NAME sha256:HEX.",
    ),
    click.option("--open-metrics", is_flag=True, help="/metrics needs no API key."),
    click.option(
        "--allowed-hosts",
        multiple=True,
        metavar="NAME",
        help="Names that the server may be called by, * for any (default: those of loopback, or any when it listens elsewhere).",
    ),
    click.option(
        "--allowed-origins",
        multiple=True,
        metavar="ORIGIN",
        help="Web pages from elsewhere that may use the server, such as https://example.org, * for any (default: none).",
    ),
    click.option(
        "--rate-requests",
        type=click.IntRange(min=1),
        metavar="N",
        help="Requests a minute for each API key, or each address.",
    ),
    click.option("--rate-tokens", type=click.IntRange(min=1), metavar="N", help="Tokens a minute, prompts included."),
    click.option("--max-concurrent", type=click.IntRange(min=1), metavar="N", help="Requests at once, for each key."),
    click.option(
        "--max-body",
        default="16 MiB",
        show_default=True,
        metavar="SIZE",
        help="Largest body of a request; more is refused (413).",
    ),
    click.option("--ssl-certfile", metavar="FILE", help="Serve HTTPS with this certificate (PEM)."),
    click.option("--ssl-keyfile", metavar="FILE", help="The certificate's key."),
    click.option(
        "--response-cache",
        "reply_cache",
        metavar="SIZE",
        help="Remember replies to greedy and seeded requests, and give them again; they say so.",
    ),
    click.option("--response-cache-shared", "reply_cache_shared", is_flag=True, help="... also to other API keys."),
    click.option(
        "--served-model-name",
        "names",
        multiple=True,
        metavar="NAME",
        help="What clients call the model (repeatable: more names).",
    ),
    context_option("Tokens of context of one request (default: what the model was made for and memory holds)."),
    click.option(
        "-np",
        "--parallel",
        "--max-num-seqs",
        "max_seqs",
        type=click.IntRange(1, 1024),
        default=16,
        show_default=True,
        metavar="N",
        help="Replies that grow at once.",
    ),
    click.option(
        "--step-tokens",
        type=click.IntRange(1, 65536),
        default=512,
        show_default=True,
        metavar="N",
        help="Most tokens computed in one step.",
    ),
    tensor_parallel_option,
    click.option(
        "--memory", metavar="SIZE", help='Memory for keys and values, such as "4 GiB" (default: from what is free).'
    ),
    click.option(
        "--kv-cache-dtype",
        "--kv",
        "kv",
        default="auto",
        metavar="TYPE",
        help="Numbers of keys and values: auto, f32, f16, bf16, int8.",
    ),
    click.option(
        "--weights",
        "--quantization",
        "weights",
        metavar="FORM",
        help="Form of the matrices: auto, plain, stored, int8, int4, q4_k_m, ...",
    ),
    dtype_option,
    device_option,
    click.option(
        "--lora-modules",
        "--lora",
        "adapters",
        multiple=True,
        metavar="NAME=PATH",
        help="An adapter (LoRA, DoRA, prefix or prompt tuning), a model of its own for clients (repeatable).",
    ),
    click.option("--enable-lora", is_flag=True, hidden=True),
    click.option(
        "--chat-template",
        "--format",
        "format_name",
        metavar="NAME",
        help="Prompt format, by name, instead of the model's own.",
    ),
    click.option(
        "--draft", metavar="MODEL", help="Guess tokens ahead: lookup, or a smaller model of the same vocabulary."
    ),
    click.option(
        "--enable-prefix-caching/--no-prefix-caching",
        "prefix_cache",
        default=True,
        help="Remember what prompts begin with (default: on).",
    ),
    click.option(
        "--deterministic", is_flag=True, help="Replies do not depend on what runs beside them, to the last bit."
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        metavar="N",
        help="Where requests without a seed get theirs (default: fresh ones).",
    ),
    click.option(
        "--max-queue",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        metavar="N",
        help="Requests that may wait; more are refused (429).",
    ),
    click.option(
        "--max-loaded",
        "--max-loaded-models",
        "max_loaded",
        type=click.IntRange(min=1),
        default=3,
        show_default=True,
        envvar=["HERD_MAX_LOADED_MODELS", "OLLAMA_MAX_LOADED_MODELS"],
        metavar="N",
        help="Models in memory at once.",
    ),
    click.option(
        "--keep-alive",
        default=None,
        envvar=["HERD_KEEP_ALIVE", "OLLAMA_KEEP_ALIVE"],
        metavar="TIME",
        help="Unload idle models after 5m, 1h, 30 (seconds); -1: never (default: never for models named here, 5m for others).",
    ),
    click.option("--lazy", is_flag=True, help="Load models when they are first asked for."),
    click.option(
        "--drain",
        "drain_seconds",
        type=click.FloatRange(min=0),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="Time for replies to end after Ctrl-C.",
    ),
    click.option(
        "--guard",
        metavar="[NAME=]MODEL",
        help="A Llama Guard that answers /v1/moderations.",
    ),
    click.option(
        "--pooling",
        type=click.Choice(["mean", "last"]),
        default="mean",
        show_default=True,
        help="What embeddings make of a text's states.",
    ),
    click.option(
        "--state-dir",
        envvar="HERD_STATE_DIR",
        type=click.Path(file_okay=False),
        metavar="FOLDER",
        help="Where files and batches are kept (default: there are none).",
    ),
    click.option(
        "--adapter-dir",
        type=click.Path(exists=True, file_okay=False),
        metavar="FOLDER",
        help="Clients may load adapters from here while the server runs.",
    ),
    click.option(
        "--fetch-images",
        is_flag=True,
        help="Open the public addresses of images that requests name, for models that see (default: data: URLs only).",
    ),
    click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="NAME=URL",
        help="A server with OpenAI's API, whose models clients call NAME/MODEL here (repeatable).",
    ),
    click.option(
        "--provider-key-env",
        "provider_keys",
        multiple=True,
        metavar="NAME=VARIABLE",
        help="The environment variable with a provider's key (default: HERD_PROVIDER_<NAME>_KEY).",
    ),
    click.option(
        "--replicas",
        type=click.IntRange(1, 1024),
        metavar="N",
        help="Copies of the server on Ray, which spreads the requests (needs herd[ray]).",
    ),
    click.option(
        "--print-kuberay",
        "image",
        metavar="IMAGE",
        help="Print the manifest that runs this server (--replicas copies) on Kubernetes, and exit.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="warning",
        show_default=True,
        help="What the log on stderr says; info: a line for each request, without its content.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="How the log is written.",
    ),
    click.option(
        "--log-requests/--disable-log-requests",
        "log_requests",
        default=True,
        help="Lines for requests (default: at level info).",
    ),
    click.option(
        "--otel",
        is_flag=True,
        help="Send a span for each reply to OpenTelemetry's collector at OTEL_EXPORTER_OTLP_ENDPOINT, which alone turns it on, "
        "too (default: http://localhost:4318; needs herd[otel]).",
    ),
)


def serve_options(command: F) -> F:
    """`command` with the options of `herd serve`, in the order in which --help shows them."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
