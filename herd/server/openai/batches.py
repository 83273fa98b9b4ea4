"""`/v1/batches`: many requests in a file, answered within a day."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, StringConstraints

from herd.server.batches import Batches
from herd.server.batchstore import Batch
from herd.server.errors import ApiError
from herd.server.fields import LIMITS, Body, body_of, parse
from herd.server.openai.files import files_of, page, seconds_of
from herd.server.stored import owner_of

__all__ = ["router"]

router = APIRouter(tags=["openai"])
Endpoint = Literal[
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/moderations"
]  # those of `herd.server.openai.HANDLERS`


class ExpiresAfter(Body):
    """When files of a batch are deleted."""

    anchor: Literal["created_at"]
    seconds: int


class BatchBody(Body):
    """A batch."""

    input_file_id: str = Field(max_length=128)
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
            Field(max_length=LIMITS["metadata"]),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None


@router.post("/v1/batches", summary="Run the requests of a file", openapi_extra=body_of(BatchBody))
async def create(request: Request) -> dict[str, Any]:
    """The batch, which is looked through and then begins."""
    files, owner = files_of(request), owner_of(request)
    body = await parse(request, BatchBody)
    try:
        source = files.find(body.input_file_id, owner)
    except ApiError as error:
        raise ApiError(400, error.message, param="input_file_id", code="invalid_value") from None
    if source.purpose != "batch":
        what = f"{source.id} was made for {source.purpose}: upload a file with purpose batch"
        raise ApiError(400, what, param="input_file_id", code="invalid_value")
    after = body.output_expires_after
    keep = None if after is None else seconds_of(after.anchor, after.seconds, "output_expires_after")
    return _batches(request).create(owner, source, body.endpoint, body.metadata or {}, keep).shown()


@router.get("/v1/batches", summary="The batches")
async def every(request: Request, limit: int = 20, after: str | None = None) -> dict[str, Any]:
    """Newest first."""
    return page([one.shown() for one in _batches(request).store.every(owner_of(request))], limit, "desc", after, 100)


@router.get("/v1/batches/{id}", summary="A batch")
async def one(request: Request, id: str) -> dict[str, Any]:
    """How far it is."""
    return _batch(request, id).shown()


@router.post("/v1/batches/{id}/cancel", summary="End a batch")
async def cancel(request: Request, id: str) -> dict[str, Any]:
    """End it; the answers that there are become its output."""
    batch = _batch(request, id)
    _batches(request).cancel(batch)
    return batch.shown()


def _batches(request: Request) -> Batches:
    files_of(request)
    return request.app.state.batches


def _batch(request: Request, id: str) -> Batch:
    return _batches(request).store.find(id, owner_of(request))
