"""Copies of the server on a Ray cluster: Ray Serve takes the requests and hands each to a copy. No torch.

Every copy is the application of `create_app` with workers of its own. What a copy keeps in memory (answers of /v1/responses, the
cache of prompts, rate limits) it keeps for itself; what would need one memory for all is refused by `check_replicas`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, fields
from importlib import util
from typing import Any

from fastapi import FastAPI

from herd.errors import ConfigError
from herd.server.app import create_app
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings
from herd.server.state import State

__all__ = ["NAME", "application", "as_json", "check_replicas", "from_json", "replica", "serve_replicas"]

NAME = "herd"
SECRETS = ("api_keys",)
"""Never written into a manifest: the copies read them from HERD_API_KEY."""


def check_replicas(settings: ServerSettings) -> None:
    """Raise ConfigError for what copies cannot honour together, or Ray not at all."""
    counts = "each copy would count for itself: limit clients in what stands before Ray"
    waits = "Ray Serve takes the connections and has limits of its own: leave it out with --replicas"
    tls = "Ray Serve speaks plain HTTP: leave TLS to what stands before it (an ingress, a proxy)"
    why = {
        "state_dir": "files and batches belong to one server: leave --state-dir out with --replicas",
        "adapter_dir": "an adapter would be loaded by one copy only: name it with --lora-modules instead of --adapter-dir",
        "providers": "the copies would need the keys, which are on this machine: leave --provider out with --replicas",
        **dict.fromkeys(("ssl_certfile", "ssl_keyfile"), tls),
        **dict.fromkeys(("rate_requests", "rate_tokens", "max_concurrent"), counts),
        **dict.fromkeys(("max_connections", "head_seconds", "body_seconds", "idle_seconds", "send_seconds"), waits),
    }
    plain = ServerSettings()
    for name, reason in why.items():
        if getattr(settings, name) != getattr(plain, name):
            raise ConfigError(f"{name}: {reason}")


def as_json(settings: ServerSettings) -> dict[str, Any]:
    """The settings that are not the default, as JSON values and without secrets."""
    plain, said = asdict(ServerSettings()), asdict(settings)
    return {name: value for name, value in said.items() if name not in SECRETS and value != plain[name]}


def from_json(value: Mapping[str, Any]) -> ServerSettings:
    """The settings of `as_json`; API keys come from the environment (HERD_API_KEY, with spaces between several).

    Raises ConfigError naming what is unknown.
    """
    known = {field.name for field in fields(ServerSettings)}
    if unknown := set(value) - known - {"replicas", "cpus", "gpus"}:
        raise ConfigError(f"there is no setting {min(unknown)!r}")
    said = {name: item for name, item in value.items() if name in known}
    said["models"] = tuple(_spec(one) for one in said.get("models", ()))
    said["engine"] = EngineOptions(**said.get("engine", {}))
    return ServerSettings(**said, api_keys=tuple(os.environ.get("HERD_API_KEY", "").split()))


def _spec(value: Mapping[str, Any]) -> ModelSpec:
    pairs = {name: tuple(map(tuple, value.get(name, ()))) for name in ("adapters", "beginning")}
    options = EngineOptions(**value.get("options", {}))
    return ModelSpec(**{**value, **pairs, "aliases": tuple(value.get("aliases", ())), "options": options})


def replica(settings: ServerSettings) -> FastAPI:
    """The application of one copy. It is ready when its models are, so that no request is sent to one that still loads."""
    app = create_app(settings)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def loaded(app: Any) -> AsyncIterator[Any]:
        async with inner(app) as given:
            state: State = app.state.herd
            for spec in () if settings.lazy else settings.models:
                await state.about(spec.name)
            yield given

    app.router.lifespan_context = loaded
    return app


def application(args: Mapping[str, Any]) -> Any:
    """What a Ray Serve configuration names as `herd.server.cluster:application`; `args` are those of `as_json` and `replicas`.

    Raises ConfigError.
    """
    settings = from_json(args)
    check_replicas(settings)
    return _bound(settings, args.get("replicas", 1), args.get("cpus", 1), args.get("gpus", 0))


def _bound(settings: ServerSettings, replicas: int, cpus: float, gpus: float) -> Any:
    from ray import serve  # pyright: ignore[reportMissingImports]

    def build() -> FastAPI:  # Ray takes plain functions only for builders
        return replica(settings)

    target = serve.ingress(build)()
    deployment = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        # The limit is the server's own: it refuses with 429 what waits beyond it, in the words of each API.
        max_ongoing_requests=settings.max_queue + 1024,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )(target)
    return deployment.bind()


def serve_replicas(settings: ServerSettings, replicas: int, *, on_start: Callable[[str], None] | None = None) -> None:
    """Run `replicas` copies on Ray, a local one or that of RAY_ADDRESS, until a signal ends it.

    Each copy gets an equal part of the cores, and of the GPUs unless the device is cpu. `on_start(url)` hears when all copies
    have loaded their models. Raises ConfigError without Ray, for what copies cannot honour, and when the port is taken.
    """
    if util.find_spec("ray") is None:
        raise ConfigError("--replicas needs Ray: pip install 'herd[ray]'")
    check_replicas(settings)
    port = _free_port(settings)
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which has handlers of its own
        signal.signal(number, lambda *_: over.set())
    try:
        has = ray.cluster_resources()
        gpus = (
            0
            if settings.engine.device == "cpu"
            else min(float(settings.engine.tensor_parallel), has.get("GPU", 0) / replicas)
        )
        serve.start(http_options={"host": settings.host, "port": port}, logging_config={"log_level": "ERROR"})
        serve.run(_bound(settings, replicas, _share(has.get("CPU", 1), replicas), gpus), name=NAME, route_prefix="/")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        if on_start is not None and not over.is_set():
            on_start(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}")
        over.wait()
    finally:
        serve.delete(NAME)  # lets replies end; other applications of a cluster go on
        ray.shutdown()


def _share(cores: float, replicas: int) -> float:
    """Cores of one copy: whole ones where there are enough, since Ray sets the number of threads to them."""
    return float(cores // replicas) if cores >= replicas else cores / replicas


def _free_port(settings: ServerSettings) -> int:
    """The port, free at this moment. Raises ConfigError when it is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
        return int(probe.getsockname()[1])
