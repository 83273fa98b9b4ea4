"""`herd serve`: OpenAI's API (and others) over models, each in a process of its own. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from herd.cli.console import note
from herd.cli.serve_options import REFUSED, serve_options
from herd.errors import ConfigError, HerdError

if TYPE_CHECKING:
    from herd.server.providers.spec import ProviderSpec
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
  herd serve nano --provider far=https://HOST/v1        models of another server, as far/MODEL
  herd serve MODEL --replicas 4                  copies on Ray; --print-kuberay IMAGE for Kubernetes

Talk to it with any OpenAI client:

\b
  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
"""


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
@serve_options
def command(models: tuple[str, ...], **options: Any) -> None:
    """Serve models over HTTP: OpenAI's API with every parameter honoured or refused by name.

    Without MODEL, every model on this machine can be asked for and is loaded then. Ctrl-C lets replies end, a second one ends
    at once.
    """
    from herd.server.logs import logged
    from herd.server.serve import serve

    settings = settings_from(models, options)
    with logged(options["log_level"], options["log_format"]):
        if options["image"] is not None:
            from herd.server.kuberay import kuberay

            click.echo(kuberay(settings, options["replicas"] or 1, options["image"]), nl=False)
        elif options["replicas"] is not None:
            from herd.server.cluster import serve_replicas

            note(f"starting {options['replicas']} copies of the server on Ray")
            serve_replicas(settings, options["replicas"], on_start=lambda url: note(f"herd serves at {url}", "bold"))
        else:
            serve(settings, on_start=lambda url, state: _said(url, state, settings))


def settings_from(models: Sequence[str], options: Mapping[str, Any]) -> ServerSettings:
    """The settings that a command line means. Raises click.UsageError or HerdError before anything is started."""
    from herd.checkpoint.open import open_store
    from herd.checkpoint.resolve import resolve
    from herd.hub.created import find
    from herd.parallel.part import Part
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
        tensor_parallel=options["tensor_parallel"],
    )
    keep_alive = _seconds(options["keep_alive"])
    names, adapters = options["names"], tuple(_pair(text, "--lora-modules") for text in options["adapters"])
    if (names or adapters) and len(models) != 1:
        raise click.UsageError(
            "--served-model-name and --lora-modules are about one MODEL: use NAME=MODEL to name several"
        )
    if adapters and engine.tensor_parallel > 1:
        raise click.UsageError(
            "--lora-modules: adapters are not possible with --tensor-parallel-size: merge them first"
        )
    here = options["image"] is None  # a manifest is for machines that have other models
    specs = []
    for given in models:
        name, source = _pair(given, "") if "=" in given and not Path(given).exists() else (_name_of(given), given)
        if here:
            store = open_store(resolve(source))  # headers only: what is not there, or damaged, is said now
            Part(store.config, 0, engine.tensor_parallel)
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
        otel=options["otel"],
        fetch_images=options["fetch_images"],
        providers=_providers(options["providers"], options["provider_keys"], any_model=not models),
    )


def _providers(given: Sequence[str], keys: Sequence[str], *, any_model: bool) -> tuple[ProviderSpec, ...]:
    """What --provider and --provider-key-env say. Keys are looked for now, and kept nowhere."""
    from herd.server.here import here
    from herd.server.providers.spec import ProviderSpec

    variables = dict(_pair(text, "--provider-key-env", "NAME=VARIABLE") for text in keys)
    if len(variables) < len(keys):
        raise click.UsageError("--provider-key-env: a provider has one key")
    specs = []
    for text in given:
        name, url = _pair(text, "--provider", "NAME=URL")
        specs.append(ProviderSpec(name=name, url=url, key_env=variables.pop(name, "")))
        specs[-1].key()
    if variables:
        raise click.UsageError(f"--provider-key-env {next(iter(variables))}: there is no provider of that name")
    if specs and any_model:
        for model in here():
            if any(model.name.startswith(f"{one.name}/") for one in specs):
                raise click.UsageError(
                    f"--provider {model.name.partition('/')[0]}: a model of this machine is called {model.name}: give the "
                    "provider another name"
                )
    return tuple(specs)


def _bytes(text: str, option: str) -> int:
    """Bytes of "16 MiB", "1 GB" or a number."""
    from herd.engine.budget import memory_of

    try:
        return memory_of(text)
    except ConfigError:
        raise click.UsageError(f"{option} {text!r}: expected bytes, or a size such as '16 MiB'") from None


def _pair(text: str, option: str, form: str = "NAME=PATH") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.UsageError(f"{option or 'MODEL'} {text!r}: expected {form}")
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
    for one in settings.providers:
        key = f"with the key in {one.variable}" if one.key() else "without a key"
        note(f"  provider       {one.name}/...: {one.url}, {key}")
        host = urlsplit(one.url).hostname or ""
        if one.key() and one.url.startswith("http://") and not is_loopback(host):
            note(f"  WARNING: the key of {one.name} and all it is sent go there without encryption", "bold yellow")
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
