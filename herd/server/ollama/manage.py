"""`/api/pull`, `/api/copy`, `/api/delete`: models of this machine, for servers that serve all of them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from herd.errors import ConfigError, HerdError, UnknownModelError
from herd.hub import created
from herd.hub.pull import pull
from herd.server.errors import ApiError, error_body, told
from herd.server.fields import Body, body_of
from herd.server.here import spec_of
from herd.server.ollama.fields import read
from herd.server.ollama.lines import NDJSON, line
from herd.server.sse import EventStream, until_gone
from herd.server.state import State, state_of

__all__ = ["router"]

router = APIRouter(tags=["ollama"])
AT_ONCE = 2
_PLACES = threading.BoundedSemaphore(AT_ONCE)
TELL_SECONDS = 0.2
"""How often a download says how far it is."""


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
    """Download a model to this machine, as herd pull does."""
    state = state_of(request)
    body = await read(request, PullBody)
    _check(state)
    name = body.called
    work = _Download(name)
    if body.stream is False:
        return await until_gone(request, work.whole()) or Response(status_code=499)
    return EventStream(work.stream(), media_type=NDJSON, ping_seconds=0)


class _Download:
    """A download in a thread, and what it says. It goes on when the client goes away; what has come is kept."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._sizes: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._notes: list[str] = []

    # the Watch of herd.hub.fetch
    def begin(self, files: list[tuple[str, int]]) -> None:
        """These come, with their sizes."""
        self._sizes = dict(files)

    def moved(self, name: str, done: int) -> None:
        """So many bytes of a file are there."""
        self._done[name] = done

    def kept(self, name: str, done: int) -> None:
        """So many were there before."""
        self._done[name] = done

    def note(self, text: str) -> None:
        """Something that people want to know."""
        self._notes.append(text)

    async def whole(self) -> Response:
        """The answer at the end."""
        await self._work()
        return JSONResponse({"status": "success"})

    async def stream(self) -> AsyncIterator[bytes]:
        """Lines while it comes."""
        yield line({"status": "pulling manifest"})
        working = asyncio.ensure_future(self._work())
        try:
            shown: dict[str, int] = {}
            while not working.done():
                await asyncio.wait({working}, timeout=TELL_SECONDS)
                while self._notes:
                    yield line({"status": self._notes.pop(0)})
                for name, size in self._sizes.items():
                    done = self._done.get(name, 0)
                    if shown.get(name) != done:
                        shown[name] = done
                        yield line({"status": f"pulling {name}", "digest": name, "total": size, "completed": done})
            await working
            yield line({"status": "success"})
        except HerdError as error:
            yield line(error_body(told(error, "a download"), "ollama"))
        finally:
            if not working.done():
                working.cancel()
                with contextlib.suppress(asyncio.CancelledError, HerdError):
                    await working

    async def _work(self) -> None:
        """Download in a thread of its own: the server's other threads stay free, and its end does not wait for this one."""
        if not _PLACES.acquire(blocking=False):
            what = f"{AT_ONCE} downloads are running, which is all that may: try again later"
            raise ApiError(429, what, code="queue_full", retry_after=30)
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()

        def end(error: BaseException | None) -> None:
            if not over.done():
                over.set_result(None) if error is None else over.set_exception(error)

        def work() -> None:
            failed: BaseException | None = None
            try:
                pull(self._name, watch=self)
            except BaseException as error:
                failed = error
            finally:
                _PLACES.release()
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(end, failed)

        threading.Thread(target=work, name="pull", daemon=True).start()
        await over


@router.post("/api/copy", summary="Give a model another name", openapi_extra=body_of(CopyBody), response_model=None)
async def copied(request: Request) -> Response:
    """As herd cp: nothing is copied but what a model of herd create says."""
    state = state_of(request)
    body = await read(request, CopyBody)
    _check(state)
    source = spec_of(body.source, state.settings)
    if source is None:
        raise UnknownModelError(f"there is no model {body.source[:80]!a} here")
    made = created.find(body.source) or created.Created(body.source, source.source)
    await asyncio.to_thread(created.copy, made, body.destination)
    return Response(status_code=200)


@router.delete(
    "/api/delete", summary="Delete a model of herd create", openapi_extra=body_of(NameBody), response_model=None
)
async def deleted(request: Request) -> Response:
    """Delete the name, and weights that belong to it alone. Downloads stay: herd rm deletes those."""
    state = state_of(request)
    body = await read(request, NameBody)
    _check(state)
    name = body.called
    made = created.find(name)
    if made is None:
        if spec_of(name, state.settings) is None:
            raise UnknownModelError(f"there is no model {name[:80]!a} here")
        raise ConfigError(f"{name[:80]} was not made with herd create, and only such are deleted here: use herd rm")
    await state.models.forget(made.name)
    await asyncio.to_thread(created.remove, made)
    return Response(status_code=200)


def _check(state: State) -> None:
    """Raise ApiError unless the server serves what is on its machine."""
    if not state.settings.any_model:
        raise ApiError(403, "this server serves the models that it was started with: start herd serve without MODEL")
