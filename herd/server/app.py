"""The application: routers, errors in the right shape, models that start and stop with it. No torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from herd import __version__
from herd.errors import HerdError
from herd.server import anthropic, batches, engine, health, ollama, openai, pages
from herd.server.errors import ApiError, api_error, error_response, shape_of, told
from herd.server.fields import known_query
from herd.server.gate import Gate
from herd.server.metrics import router as metrics_router
from herd.server.models import Launch, Models
from herd.server.openai import chat, completions
from herd.server.openai import models as model_list
from herd.server.process import Process
from herd.server.settings import ServerSettings
from herd.server.state import State

__all__ = ["ROUTERS", "create_app"]

ROUTERS: Sequence[APIRouter] = (
    health.router,
    engine.router,
    pages.router,
    model_list.router,
    chat.router,
    completions.router,
    *openai.ROUTERS,
    *anthropic.ROUTERS,
    *ollama.ROUTERS,
)
"""Every router of the server, in the order of its documentation."""


def create_app(settings: ServerSettings, *, launch: Launch = Process) -> FastAPI:
    """The application of a server. `launch` makes what runs a model (tests give doubles)."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state: State = app.state.herd
        await state.models.start()
        try:
            async with batches.running(app):
                yield
        finally:
            state.draining = True
            state.stop_all("the server is shutting down")
            await state.models.close()
            await state.providers.close()
            if state.counts.tracing is not None:
                await asyncio.to_thread(state.counts.tracing.close)

    app = FastAPI(
        title="herd",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        root_path=settings.root_path,
        dependencies=[Depends(known_query)],
    )
    app.state.herd = State(settings, Models(settings, launch))
    for router in (*ROUTERS, metrics_router):
        app.include_router(router)
    app.add_exception_handler(HerdError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RequestValidationError, _wrong_query)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Gate, state=app.state.herd)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    return error_response(told(error, f"{request.method} {request.url.path}"), shape_of(request.url.path))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        what = f"there is no {request.method} {ascii(request.url.path[:200])[1:-1]} here"
    elif error.status_code == 405:
        what = f"{request.method} is not what {ascii(request.url.path[:200])[1:-1]} takes"
    else:
        what = str(error.detail)
    response = error_response(ApiError(error.status_code, what), shape_of(request.url.path))
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: Exception) -> Response:
    """The client went away before all of its request had come: nobody reads this."""
    return Response(status_code=499)


async def _wrong_query(request: Request, error: Exception) -> Response:
    """A query or path parameter that is not of its type. (Bodies are read by `fields.parse`.)"""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ascii(str(first["loc"][-1])[:60])[1:-1]
    refusal = ApiError(400, f"{name}: {first['msg'].lower()}", param=name, code="invalid_type")
    return error_response(refusal, shape_of(request.url.path))


async def _bug(request: Request, error: Exception) -> Response:
    """What nobody foresaw. Starlette logs it with its traceback, too."""
    return error_response(api_error(error), shape_of(request.url.path))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the definitions of request bodies (`fields.body_of`) among its components."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=_DESCRIPTION)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        _gather(document["paths"], schemas)
        for schema in list(schemas.values()):
            _gather(schema, schemas)
        app.openapi_schema = document
    return app.openapi_schema


_DESCRIPTION = "Llama models behind the APIs that clients know. Every parameter is honoured, or refused by name."


def _gather(part: Any, schemas: dict[str, Any]) -> None:
    """Move every `$defs` inside `part` to `schemas`."""
    if isinstance(part, dict):
        for name, schema in part.pop("$defs", {}).items():
            _gather(schema, schemas)
            schemas[name] = schema
        for value in part.values():
            _gather(value, schemas)
    elif isinstance(part, list):
        for value in part:
            _gather(value, schemas)
