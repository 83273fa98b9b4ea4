"""`herd serve`: OpenAI's API (and others) over models, each in a process of its own. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from herd.cli.console import note
from herd.cli.options import DTYPES
from herd.errors import ConfigError, HerdError

if TYPE_CHECKING:
    from herd.server.settings import ServerSettings
    from herd.server.state import State

__all__ = ["command", "settings_from"]

EPILOG = """\
Examples:

\b
  herd serve                                     every model on this machine, loaded when it is asked for
  herd serve nano                                one model, loaded at once, on http://127.0.0.1:8000
  herd serve llama3.2:1b coder=./CodeLlama-7b    several; NAME= says what clients call one
  herd serve ./Llama-3.2-1B --quantization int4 -c 8192 --port 8080
  herd serve MODEL --lora-modules support=./adapter     model "support", or "MODEL@support"
  herd serve MODEL --replicas 4                  copies on Ray; --print-kuberay IMAGE for Kubernetes

Talk to it with any OpenAI client:

\b
  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
"""

F = TypeVar("F", bound=Callable[..., Any])
KEYS = ("auto", "f32", "f16", "bf16", "int8", "q8_0", "fp8", "fp8_e4m3", "fp8_e5m2", "float32", "float16", "bfloat16")

REFUSED = {
    "--tensor-parallel-size": "one model over several devices is not supported yet",
    "-tp": "one model over several devices is not supported yet",
    "--pipeline-parallel-size": "one model over several devices is not supported yet",
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


class _Serve(click.Command):
    """Says what to do instead of flags that other servers have."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for arg in args:
            name = arg.split("=")[0]
            if name in REFUSED:
                raise click.UsageError(f"{name}: {REFUSED[name]}", ctx)
        return super().parse_args(ctx, args)


@click.command(cls=_Serve, epilog=EPILOG)
@click.argument("models", nargs=-1, metavar="[[NAME=]MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N", help="0: any free one."
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="HERD_API_KEY",
    metavar="KEY",
    help="Clients must send one of these (repeatable). Others see arguments of programs: prefer the file, or HERD_API_KEY.",
)
@click.option(
    "--api-key-file",
    envvar="HERD_API_KEY_FILE",
    metavar="FILE",
    help="API keys, one a line: KEY, NAME KEY, or NAME sha256:HEX.",
)
@click.option("--open-metrics", is_flag=True, help="/metrics needs no API key.")
@click.option(
    "--allowed-hosts",
    multiple=True,
    metavar="NAME",
    help="Names that the server may be called by, * for any (default: those of loopback, or any when it listens elsewhere).",
)
@click.option(
    "--allowed-origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web pages from elsewhere that may use the server, such as https://example.org, * for any (default: none).",
)
@click.option(
    "--rate-requests",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests a minute for each API key, or each address.",
)
@click.option("--rate-tokens", type=click.IntRange(min=1), metavar="N", help="Tokens a minute, prompts included.")
@click.option("--max-concurrent", type=click.IntRange(min=1), metavar="N", help="Requests at once, for each key.")
@click.option(
    "--max-body",
    default="16 MiB",
    show_default=True,
    metavar="SIZE",
    help="Largest body of a request; more is refused (413).",
)
@click.option("--ssl-certfile", metavar="FILE", help="Serve HTTPS with this certificate (PEM).")
@click.option("--ssl-keyfile", metavar="FILE", help="The certificate's key.")
@click.option(
    "--response-cache",
    "reply_cache",
    metavar="SIZE",
    help="Remember replies to greedy and seeded requests, and give them again; they say so.",
)
@click.option("--response-cache-shared", "reply_cache_shared", is_flag=True, help="... also to other API keys.")
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    metavar="NAME",
    help="What clients call the model (repeatable: more names).",
)
@click.option(
    "-c",
    "--ctx-size",
    "--max-model-len",
    "max_len",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of context of one request (default: what the model was made for and memory holds).",
)
@click.option(
    "-np",
    "--parallel",
    "--max-num-seqs",
    "max_seqs",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    metavar="N",
    help="Replies that grow at once.",
)
@click.option(
    "--step-tokens",
    type=click.IntRange(1, 65536),
    default=512,
    show_default=True,
    metavar="N",
    help="Most tokens computed in one step.",
)
@click.option(
    "--memory", metavar="SIZE", help='Memory for keys and values, such as "4 GiB" (default: from what is free).'
)
@click.option(
    "--kv-cache-dtype",
    "--kv",
    "kv",
    default="auto",
    metavar="TYPE",
    help="Numbers of keys and values: auto, f32, f16, bf16, int8.",
)
@click.option(
    "--weights",
    "--quantization",
    "weights",
    metavar="FORM",
    help="Form of the matrices: auto, plain, stored, int8, int4, q4_k_m, ...",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Number type of the weights (default: auto).")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (default: auto).")
@click.option(
    "--lora-modules",
    "--lora",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    help="A LoRA adapter, a model of its own for clients (repeatable).",
)
@click.option("--enable-lora", is_flag=True, hidden=True)
@click.option(
    "--chat-template",
    "--format",
    "format_name",
    metavar="NAME",
    help="Prompt format, by name, instead of the model's own.",
)
@click.option("--draft", metavar="MODEL", help="Guess tokens ahead: lookup, or a smaller model of the same vocabulary.")
@click.option(
    "--enable-prefix-caching/--no-prefix-caching",
    "prefix_cache",
    default=True,
    help="Remember what prompts begin with (default: on).",
)
@click.option("--deterministic", is_flag=True, help="Replies do not depend on what runs beside them, to the last bit.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    help="Where requests without a seed get theirs (default: fresh ones).",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Requests that may wait; more are refused (429).",
)
@click.option(
    "--max-loaded",
    "--max-loaded-models",
    "max_loaded",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    envvar=["HERD_MAX_LOADED_MODELS", "OLLAMA_MAX_LOADED_MODELS"],
    metavar="N",
    help="Models in memory at once.",
)
@click.option(
    "--keep-alive",
    default=None,
    envvar=["HERD_KEEP_ALIVE", "OLLAMA_KEEP_ALIVE"],
    metavar="TIME",
    help="Unload idle models after 5m, 1h, 30 (seconds); -1: never (default: never for models named here, 5m for others).",
)
@click.option("--lazy", is_flag=True, help="Load models when they are first asked for.")
@click.option(
    "--drain",
    "drain_seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for replies to end after Ctrl-C.",
)
@click.option(
    "--guard",
    metavar="[NAME=]MODEL",
    help="A Llama Guard that answers /v1/moderations.",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last"]),
    default="mean",
    show_default=True,
    help="What embeddings make of a text's states.",
)
@click.option(
    "--state-dir",
    envvar="HERD_STATE_DIR",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="Where files and batches are kept (default: there are none).",
)
@click.option(
    "--adapter-dir",
    type=click.Path(exists=True, file_okay=False),
    metavar="FOLDER",
    help="Clients may load LoRA adapters from here while the server runs.",
)
@click.option(
    "--replicas",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Copies of the server on Ray, which spreads the requests (needs herd[ray]).",
)
@click.option(
    "--print-kuberay",
    "image",
    metavar="IMAGE",
    help="Print the manifest that runs this server (--replicas copies) on Kubernetes, and exit.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="What the log on stderr says; info: a line for each request, without its content.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How the log is written.",
)
@click.option(
    "--log-requests/--disable-log-requests",
    "log_requests",
    default=True,
    help="Lines for requests (default: at level info).",
)
def command(models: tuple[str, ...], **options: Any) -> None:
    """Serve models over HTTP: OpenAI's API with every parameter honoured or refused by name.

    Without MODEL, every model on this machine can be asked for and is loaded then. Ctrl-C lets replies end, a second one ends
    at once.
    """
    from herd.server.logs import start_log
    from herd.server.serve import serve

    settings = settings_from(models, options)
    start_log(options["log_level"], options["log_format"])
    if options["image"] is not None:
        from herd.server.kuberay import kuberay

        click.echo(kuberay(settings, options["replicas"] or 1, options["image"]), nl=False)
        return
    if options["replicas"] is not None:
        from herd.server.cluster import serve_replicas

        note(f"starting {options['replicas']} copies of the server on Ray")
        serve_replicas(settings, options["replicas"], on_start=lambda url: note(f"herd serves at {url}", "bold"))
        return
    serve(settings, on_start=lambda url, state: _said(url, state, settings))


def settings_from(models: Sequence[str], options: Mapping[str, Any]) -> ServerSettings:
    """The settings that a command line means. Raises click.UsageError or HerdError before anything is started."""
    from herd.checkpoint.open import open_store
    from herd.checkpoint.resolve import resolve
    from herd.hub.created import find
    from herd.server.auth import read_keys
    from herd.server.here import created_spec
    from herd.server.settings import EngineOptions, ModelSpec, ServerSettings

    weights = options["weights"]
    engine = EngineOptions(
        weights=None if weights == "auto" else weights,
        dtype=None if options["dtype"] == "auto" else options["dtype"],
        device=options["device"],
        format=options["format_name"],
        kv=options["kv"],
        max_len=options["max_len"],
        memory=options["memory"],
        max_seqs=options["max_seqs"],
        step_tokens=options["step_tokens"],
        prefix_cache=options["prefix_cache"],
        deterministic=options["deterministic"],
        seed=options["seed"],
        draft=options["draft"],
    )
    keep_alive = _seconds(options["keep_alive"])
    names, adapters = options["names"], tuple(_pair(text, "--lora-modules") for text in options["adapters"])
    if (names or adapters) and len(models) != 1:
        raise click.UsageError(
            "--served-model-name and --lora-modules are about one MODEL: use NAME=MODEL to name several"
        )
    here = options["image"] is None  # a manifest is for machines that have other models
    specs = []
    for given in models:
        name, source = _pair(given, "") if "=" in given and not Path(given).exists() else (_name_of(given), given)
        if here:
            open_store(resolve(source))  # headers only: what is not there, or damaged, is said now
        called = tuple(names) or (name,)
        plain = ModelSpec(
            source=source, name=called[0], aliases=called[1:], adapters=adapters, options=engine,
            keep_alive=None if keep_alive is None or keep_alive < 0 else keep_alive,
        )  # fmt: skip
        made = None if Path(source).exists() else find(source)
        specs.append(plain if made is None else created_spec(made, plain))
    guard = options["guard"]
    if guard is not None:
        named = "=" in guard and not Path(guard).exists()
        name, source = _pair(guard, "--guard") if named else (_name_of(guard), guard)
        if all(name not in (one.name, *one.aliases) for one in specs):
            if here:
                open_store(resolve(source))
            specs.append(ModelSpec(source=source, name=name, options=replace(engine, format=None, draft=None)))
        guard = name
    for _, path in adapters:
        if here and not Path(path).exists():
            raise click.UsageError(f"--lora-modules: there is no {path}")
    return ServerSettings(
        models=tuple(specs),
        host=options["host"],
        port=options["port"],
        any_model=not models,
        lazy=options["lazy"],
        engine=engine,
        keep_alive=300.0 if keep_alive is None else None if keep_alive < 0 else keep_alive,
        max_loaded=max(options["max_loaded"], len(specs)),
        max_queue=options["max_queue"],
        drain_seconds=options["drain_seconds"],
        guard=guard,
        pooling=options["pooling"],
        state_dir=options["state_dir"],
        adapter_dir=options["adapter_dir"],
        api_keys=(*options["api_keys"], *(read_keys(options["api_key_file"]) if options["api_key_file"] else ())),
        open_metrics=options["open_metrics"],
        allowed_hosts=tuple(options["allowed_hosts"]),
        allowed_origins=tuple(options["allowed_origins"]),
        rate_requests=options["rate_requests"],
        rate_tokens=options["rate_tokens"],
        max_concurrent=options["max_concurrent"],
        max_body=_bytes(options["max_body"], "--max-body"),
        ssl_certfile=options["ssl_certfile"],
        ssl_keyfile=options["ssl_keyfile"],
        reply_cache=0 if options["reply_cache"] is None else _bytes(options["reply_cache"], "--response-cache"),
        reply_cache_shared=options["reply_cache_shared"],
        log_requests=options["log_requests"],
    )


def _bytes(text: str, option: str) -> int:
    """Bytes of "16 MiB", "1 GB" or a number."""
    from herd.engine.budget import memory_of

    try:
        return memory_of(text)
    except ConfigError:
        raise click.UsageError(f"{option} {text!r}: expected bytes, or a size such as '16 MiB'") from None


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.UsageError(f"{option or 'MODEL'} {text!r}: expected NAME=PATH")
    return name, value


def _name_of(model: str) -> str:
    """What clients call a model that nobody named: the last part of a path, any other name as it is."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    return path.resolve().stem if path.suffix == ".gguf" else path.resolve().name


def _seconds(text: str | None) -> float | None:
    """Seconds of "5m", "1h", "30", "30s"; None as it is."""
    if text is None:
        return None
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        return float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        raise click.UsageError(f"--keep-alive {text!r}: expected a time such as 5m, 1h, 30, or -1") from None


def _said(url: str, state: State, settings: ServerSettings) -> None:
    """What a person wants to know when the server listens, and when each model is ready."""
    import asyncio

    from herd.server.origins import is_loopback

    note(f"herd serves at {url}", "bold")
    note(f"  web page       {url}/")
    note(f"  OpenAI's API   {url}/v1")
    if not settings.models:
        note("  models         every one on this machine, loaded when it is asked for (herd list shows them)")
    if settings.api_keys:
        note(f"  API keys       {len(settings.api_keys)}: requests need one of them")
    elif not is_loopback(settings.host):
        note(
            f"  WARNING: no API key, and {settings.host} is not this machine alone: everyone who can reach "
            "this address can use the models (--api-key-file)",
            "bold yellow",
        )
    for spec in settings.models:
        more = f" (also {', '.join(spec.aliases)})" if spec.aliases else ""
        note(f"  model          {spec.name}{more}: {'loaded when it is asked for' if settings.lazy else 'loading'}")
    if settings.models and not settings.lazy:
        task = asyncio.get_running_loop().create_task(_ready(state, settings))
        _TASKS.add(task)
        task.add_done_callback(_TASKS.discard)


_TASKS: set[Any] = set()


async def _ready(state: State, settings: ServerSettings) -> None:
    """Say of each model when it is ready, and what it got of the memory."""
    for spec in settings.models:
        try:
            about = await state.about(spec.name)
        except HerdError:
            return  # the server ends with the reason
        tools = "" if about.tools else ", without tools"
        format = f"{about.format} prompts{tools}" if about.format else "a base model: completions only"
        note(f"  ready          {spec.name}: {about.parameters / 1e6:,.1f} M parameters in {about.kind}, {format}")
        note(f"                 {about.budget}")
        if spec.name == settings.guard and not (about.format or "").startswith("llama-guard"):
            note(f"  {spec.name} is no Llama Guard: /v1/moderations will be refused", "yellow")
        for name in about.adapters:
            note(f"  adapter        {name} (or {spec.name}@{name})")
