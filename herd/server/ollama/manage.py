"""`/api/pull`, `/api/copy`, `/api/delete`: models of this machine, for servers that serve all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from herd.errors import ConfigError, HerdError, UnknownModelError
from herd.hub import created
from herd.server.errors import ApiError, error_body, told
from herd.server.fields import Body, body_of
from herd.server.here import spec_of
from herd.server.ollama.fields import read
from herd.server.ollama.lines import NDJSON, line
from herd.server.sse import EventStream, until_gone
from herd.server.state import State, state_of

__all__ = ["router"]

router = APIRouter(tags=["ollama"])


class NameBody(Body):
    """A model by name."""

    model: str | None = Field(None, max_length=512)
    name: str | None = Field(None, max_length=512)

    @property
    def called(self) -> str:
        """The name. Raises ApiError (400) when there is none."""
        if not (self.model or self.name):
            raise ApiError(400, "model is missing", param="model", code="missing_required_parameter")
        if self.model and self.name and self.model != self.name:
            raise ApiError(400, "name is not model: give one of them", param="name", code="invalid_value")
        return self.model or self.name or ""


class PullBody(NameBody):
    """A download."""

    stream: bool | None = None

    refused: ClassVar = {"username": "use HF_TOKEN on the server", "password": "use HF_TOKEN on the server"}
    neutral: ClassVar = {"insecure": (False,)}


class CopyBody(Body):
    """Another name for a model."""

    source: str = Field(min_length=1, max_length=512)
    destination: str = Field(min_length=1, max_length=512)


@router.post("/api/pull", summary="Download a model", openapi_extra=body_of(PullBody), response_model=None)
async def pulled(request: Request) -> Response:
    """Download a model to this machine, as herd pull does. Who asks for one that is on its way waits for that one; it ends when
    nobody does, and what has come is kept."""
    state = state_of(request)
    body = await read(request, PullBody)
    _check(state)
    name = body.called
    if body.stream is False:
        return await until_gone(request, _whole(state, name)) or Response(status_code=499)
    return EventStream(_told(state, name), media_type=NDJSON, ping_seconds=0)


async def _whole(state: State, name: str) -> Response:
    with state.downloads.joined(name) as work:
        await asyncio.shield(work.over)
    state.models.look_again()
    return JSONResponse({"status": "success"})


async def _told(state: State, name: str) -> AsyncIterator[bytes]:
    try:
        with state.downloads.joined(name) as work:
            async for one in work.told():
                yield line(one)
    except HerdError as error:
        yield line(error_body(told(error, "a download"), "ollama"))
    finally:
        state.models.look_again()


@router.post("/api/copy", summary="Give a model another name", openapi_extra=body_of(CopyBody), response_model=None)
async def copied(request: Request) -> Response:
    """As herd cp: nothing is copied but what a model of herd create says."""
    state = state_of(request)
    body = await read(request, CopyBody)
    _check(state)
    await asyncio.to_thread(_copy, state, body.source, body.destination)
    state.models.look_again()
    return Response(status_code=200)


def _copy(state: State, name: str, destination: str) -> None:
    source = spec_of(name, state.settings)
    if source is None:
        raise UnknownModelError(f"there is no model {name[:80]!a} here")
    created.copy(created.find(name) or created.Created(name, source.source), destination)


@router.delete(
    "/api/delete", summary="Delete a model of herd create", openapi_extra=body_of(NameBody), response_model=None
)
async def deleted(request: Request) -> Response:
    """Delete the name, and weights that belong to it alone. Downloads stay: herd rm deletes those."""
    state = state_of(request)
    body = await read(request, NameBody)
    _check(state)
    name = body.called
    made = await asyncio.to_thread(_made, state, name)
    await state.models.forget(made.name)
    await asyncio.to_thread(created.remove, made)
    state.models.look_again()
    return Response(status_code=200)


def _made(state: State, name: str) -> created.Created:
    made = created.find(name)
    if made is None:
        if spec_of(name, state.settings) is None:
            raise UnknownModelError(f"there is no model {name[:80]!a} here")
        raise ConfigError(f"{name[:80]} was not made with herd create, and only such are deleted here: use herd rm")
    return made


def _check(state: State) -> None:
    """Raise ApiError unless the server serves what is on its machine."""
    if not state.settings.any_model:
        raise ApiError(403, "this server serves the models that it was started with: start herd serve without MODEL")
