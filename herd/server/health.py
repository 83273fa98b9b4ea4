"""`/health`, `/version`: whether the server can answer, and which one it is. No torch."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from herd import __version__
from herd.server.state import state_of

__all__ = ["router"]

router = APIRouter(tags=["server"])


@router.get("/health", summary="200 when models are ready; 503 with the progress of loading")
async def health(request: Request) -> Response:
    """The state of the models that were named. It needs no key: why one failed is in the log and at `/v1/engine`."""
    state = state_of(request)
    good, rows = state.models.health()
    status = "draining" if state.draining else "ok" if good else _worst(rows)
    body: dict[str, Any] = {"status": status, "models": rows}
    if state.providers.all:
        body["providers"] = state.providers.health()
    return JSONResponse(body, 200 if status == "ok" else 503)


def _worst(rows: list[dict[str, object]]) -> str:
    return "failed" if any(row["state"] == "failed" for row in rows) else "loading"


@router.get("/version", summary="The version of herd")
async def version() -> dict[str, str]:
    """The version of herd."""
    return {"version": __version__}
