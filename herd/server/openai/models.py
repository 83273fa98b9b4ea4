"""`/v1/models`: what clients can ask for."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from herd.errors import UnknownModelError
from herd.hub.found import Found
from herd.server.here import here
from herd.server.models import Slot
from herd.server.state import state_of

__all__ = ["router"]

router = APIRouter(tags=["openai"])


@router.get("/v1/models", summary="The models, and adapters as models of their own")
async def models(request: Request) -> dict[str, Any]:
    """Every name that a request may have under `model`."""
    state = state_of(request)
    rows = {name: _row(name, slot, adapter) for name, slot, adapter in state.models.names()}
    if state.settings.any_model:
        for model in await asyncio.to_thread(lambda: list(here())):
            if state.settings.provider_of(model.name) is None:
                rows.setdefault(model.name, _found(model))
    rows |= {row["id"]: row for row in await state.providers.models()}
    return {"object": "list", "data": list(rows.values())}


@router.get("/v1/models/{name:path}", summary="One model")
async def model(request: Request, name: str) -> dict[str, Any]:
    """A model by name."""
    state = state_of(request)
    if (row := await state.providers.model(name)) is not None:
        return row
    for known, slot, adapter in state.models.names():
        if known == name:
            return _row(known, slot, adapter)
    raise UnknownModelError(f"there is no model {name[:80]!a} here")


def _found(model: Found) -> dict[str, Any]:
    """A model of this machine that nobody has asked for yet."""
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified),
        "owned_by": "herd",
        "root": model.name,
        "parent": None,
        "max_model_len": None,
        "meta": {"state": "unloaded"},
    }


def _row(name: str, slot: Slot, adapter: str | None) -> dict[str, Any]:
    """A model object: OpenAI's fields, and those that vLLM and llama.cpp add."""
    about = slot.about
    return {
        "id": name,
        "object": "model",
        "created": slot.created,
        "owned_by": "herd",
        "root": slot.spec.name if adapter is None else adapter,
        "parent": None if adapter is None else slot.spec.name,
        "max_model_len": slot.context(adapter),
        "meta": {"state": slot.state}
        | ({} if about is None else {"n_params": about.parameters, "kind": about.kind, "format": about.format}),
    }
