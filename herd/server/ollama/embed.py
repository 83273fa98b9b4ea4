"""`POST /api/embed`, and `/api/embeddings`, its older form."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from herd.chat.params import MAX_INT
from herd.server.errors import ApiError
from herd.server.fields import LIMITS, Body, body_of
from herd.server.ollama.fields import check_context, keep, lasting, read
from herd.server.openai.chat import check_work
from herd.server.openai.embeddings import embedded, floats
from herd.server.sse import until_gone
from herd.server.state import State, state_of

__all__ = ["router"]

router = APIRouter(tags=["ollama"])
Given = Annotated[str, Field(min_length=1)]


class _Common(Body):
    model: str = Field(min_length=1, max_length=512)
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None

    neutral: ClassVar = {"truncate": (False,)}


class EmbedBody(_Common):
    """Texts to be embedded. Inputs are never cut: one that does not fit is refused, as with `truncate` false."""

    input: Given | Annotated[list[Given], Field(min_length=1, max_length=LIMITS["inputs"])]
    dimensions: int | None = Field(None, ge=1, le=MAX_INT)


class EmbeddingsBody(_Common):
    """The older request: one text."""

    prompt: Given


@router.post("/api/embed", summary="Texts as vectors", openapi_extra=body_of(EmbedBody), response_model=None)
async def embed(request: Request) -> Response:
    """Ollama's embeddings: vectors of length one."""
    body = await read(request, EmbedBody)
    inputs = [body.input] if isinstance(body.input, str) else body.input
    found = await until_gone(request, _vectors(state_of(request), body, inputs, body.dimensions, True))
    if found is None:
        return Response(status_code=499)
    vectors, counts, total, loading = found
    return JSONResponse(
        {
            "model": body.model,
            "embeddings": vectors,
            "total_duration": total,
            "load_duration": loading,
            "prompt_eval_count": counts,
        }
    )


@router.post(
    "/api/embeddings", summary="One text as a vector", openapi_extra=body_of(EmbeddingsBody), response_model=None
)
async def embeddings(request: Request) -> Response:
    """Ollama's older embeddings: the vector as it is."""
    body = await read(request, EmbeddingsBody)
    found = await until_gone(request, _vectors(state_of(request), body, [body.prompt], None, False))
    return Response(status_code=499) if found is None else JSONResponse({"embedding": found[0][0]})


async def _vectors(
    state: State, body: _Common, inputs: list[str], dimensions: int | None, normalize: bool
) -> tuple[list[list[float]], int, int, int]:
    """The vectors, their tokens, and nanoseconds: in all, and until the model was there."""
    seconds = lasting(state, body.model, body.keep_alive)
    if others := [name for name in body.options or {} if name != "num_ctx"]:
        raise ApiError(400, f"options.{others[0][:60]}: embeddings have no such option", param=f"options.{others[0]}")
    check_work(state, 1, sum(map(len, inputs)), "input")
    arrived = time.monotonic()
    check_context(body.options, await state.about(body.model))
    loaded = time.monotonic()
    vectors, counts = await embedded(state, body.model, inputs, dimensions=dimensions, normalize=normalize)
    keep(state.models.find(body.model)[0], seconds)
    total = int((time.monotonic() - arrived) * 1e9)
    return [floats(vector) for vector in vectors], sum(counts), total, int((loaded - arrived) * 1e9)
