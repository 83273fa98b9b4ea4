"""`/v1/files`: what batches read and write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from herd.server.errors import ApiError
from herd.server.filestore import Files, Kept
from herd.server.stored import owner_of

__all__ = ["files_of", "page", "router", "seconds_of"]

router = APIRouter(tags=["openai"])
HOUR, MONTH = 3600, 30 * 86400
FORM_BYTES = 1 << 16
"""What a form may have beside its file."""
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": HOUR, "maximum": MONTH},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", summary="Keep a file for a batch", openapi_extra=_FORM)
async def upload(request: Request) -> dict[str, Any]:
    """A multipart form with `file` and `purpose`, which is batch."""
    files = files_of(request)
    most = request.app.state.herd.settings.max_file
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(415, f"the body is {kind[:80]!a}: send a form, with Content-Type: multipart/form-data")
    # What the form has beside its file is not known yet; `add` looks at the file's own size.
    with files.uploading(min(max(0, _told(request, most) - FORM_BYTES), most)) as place:
        return await _upload(request, files, most, place)


async def _upload(request: Request, files: Files, most: int, place: object) -> dict[str, Any]:
    parser = MultiPartParser(request.headers, _counted(request, most), max_files=1, max_fields=8, max_part_size=1024)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from None
    except (KeyError, ValueError, LookupError):
        raise ApiError(
            400, "the form cannot be read: it has no boundary, or a wrong one", code="invalid_form"
        ) from None
    try:
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        given = form.get("file")
        for name in form:
            if name not in _FORM["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]:
                raise ApiError(400, f"unknown field: {name[:80]!a}", param=name[:80], code="unknown_parameter")
        if not isinstance(given, UploadFile):
            raise ApiError(400, "file is missing", param="file", code="missing_required_parameter")
        check_purpose(fields.get("purpose"))
        after = seconds_of(fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]"), "expires_after")
        name = given.filename or "file"
        after = MONTH if after is None else after  # OpenAI's own default for what batches read
        kept = await asyncio.to_thread(files.add, given.file, owner_of(request), name, "batch", after, place=place)
    finally:
        await form.close()
    return kept.shown()


@router.get("/v1/files", summary="The files that are kept")
async def every(
    request: Request, limit: int = 10_000, order: str = "desc", after: str | None = None, purpose: str | None = None
) -> dict[str, Any]:
    """Newest first unless order is asc."""
    kept = [one for one in files_of(request).every(owner_of(request)) if purpose in (None, one.purpose)]
    return page([one.shown() for one in kept], limit, order, after, 10_000)


@router.get("/v1/files/{id}", summary="A file")
async def one(request: Request, id: str) -> dict[str, Any]:
    """What is known of it."""
    return _kept(request, id).shown()


@router.get("/v1/files/{id}/content", summary="What a file holds", response_class=FileResponse)
async def content(request: Request, id: str) -> FileResponse:
    """Its bytes."""
    kept = _kept(request, id)
    path = files_of(request).path(kept)
    return FileResponse(path, media_type="application/octet-stream", filename=kept.filename)


@router.delete("/v1/files/{id}", summary="Forget a file")
async def delete(request: Request, id: str) -> dict[str, Any]:
    """Forget it, and give its room back."""
    kept = _kept(request, id)
    reader = request.app.state.batches.store.reader_of(kept.id)
    if reader is not None:
        raise ApiError(
            409, f"{kept.id} is read by {reader}, which has not ended: cancel that first", code="file_in_use"
        )
    await asyncio.to_thread(files_of(request).delete, kept)
    return {"id": kept.id, "object": "file", "deleted": True}


def files_of(request: Request) -> Files:
    """The server's files. Raises ApiError (501) when it was started without a folder for them."""
    files = getattr(request.app.state, "files", None)
    if files is None:
        raise ApiError(501, "this server keeps no files: start it with --state-dir FOLDER", code="not_configured")
    return files


def page(rows: Sequence[dict[str, Any]], limit: int, order: str, after: str | None, most: int) -> dict[str, Any]:
    """A page of a list that has the newest first. Raises ApiError (400)."""
    if not 1 <= limit <= most:
        raise ApiError(400, f"limit is {limit}: expected 1 to {most:,}", param="limit", code="invalid_value")
    if order not in ("asc", "desc"):
        raise ApiError(400, "order: expected asc or desc", param="order", code="invalid_value")
    rows = list(rows) if order == "desc" else list(reversed(rows))
    if after is not None:
        at = next((i for i, row in enumerate(rows) if row["id"] == after), None)
        if at is None:
            raise ApiError(400, f"after: there is no {after[:80]!a}", param="after", code="invalid_value")
        rows = rows[at + 1 :]
    found = rows[:limit]
    first, last = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    return {"object": "list", "data": found, "first_id": first, "last_id": last, "has_more": len(rows) > limit}


def check_purpose(purpose: str | None) -> None:
    """Raise ApiError (400) for a purpose that nothing here has."""
    if purpose is None:
        raise ApiError(400, "purpose is missing", param="purpose", code="missing_required_parameter")
    if purpose != "batch":
        what = f"purpose is {purpose[:40]!a}: files are for batches here, expected 'batch'"
        raise ApiError(400, what, param="purpose", code="unsupported_parameter")


def seconds_of(anchor: str | None, seconds: str | int | None, where: str) -> int | None:
    """After how many seconds a file is deleted. Raises ApiError (400)."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise ApiError(400, f"{where}: anchor is 'created_at'", param=where, code="invalid_value")
    number = int(seconds) if seconds is not None and str(seconds).isdecimal() and len(str(seconds)) < 10 else 0
    if not HOUR <= number <= MONTH:
        raise ApiError(400, f"{where}: seconds are {HOUR:,} to {MONTH:,}", param=where, code="invalid_value")
    return number


def _kept(request: Request, id: str) -> Kept:
    return files_of(request).find(id, owner_of(request))


def _told(request: Request, default: int) -> int:
    """How long the body says that it is."""
    told = request.headers.get("content-length", "")
    return int(told) if told.isdecimal() and len(told) < 16 else default


async def _counted(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body, until it is too long."""
    seen = _told(request, 0)
    if seen <= most + FORM_BYTES:
        seen = 0
        async for data in request.stream():
            seen += len(data)
            if seen > most + FORM_BYTES:
                break
            yield data
    if seen > most + FORM_BYTES:
        raise ApiError(413, f"the file is too large: at most {most:,} bytes", code="request_too_large")
