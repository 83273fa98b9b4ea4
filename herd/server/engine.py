"""`/v1/engine`: what the server does now, in numbers. The page `/engine` draws them. No torch."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from herd import __version__
from herd.server.here import pathless
from herd.server.models import Slot
from herd.server.state import State, state_of

__all__ = ["router"]

router = APIRouter(tags=["server"])


@router.get("/v1/engine", summary="Models, their memory, requests, KV blocks and counts, now")
async def engine(request: Request) -> dict[str, Any]:
    """Everything that is known without asking a model: the workers tell their counts once a second.

    Nothing of what requests say is in it. Numbers that are not known (a model that is not loaded, a remote one) are null.
    """
    state = state_of(request)
    return {
        "object": "engine",
        "version": __version__,
        "uptime": round(time.time() - state.started, 3),
        "draining": state.draining,
        "limits": {"queue": state.settings.max_queue, "loaded_models": state.settings.max_loaded},
        "models": [_row(state, slot) for slot in state.models.slots.values()],
    }


def _row(state: State, slot: Slot) -> dict[str, Any]:
    about, process, now = slot.about, slot.process, time.monotonic()
    ages = sorted((round(now - one.began, 3) for one in state.running if _is(state, one.name, slot)), reverse=True)
    idle = slot.keep_alive is not None and not slot.users and slot.state == "ready"
    return {
        "name": slot.spec.name,
        "aliases": list(slot.spec.aliases),
        "adapters": list(slot.adapters),
        "state": slot.state,
        "error": None if process is None or process.error is None else pathless(str(process.error), slot.spec),
        "progress": None
        if process is None or slot.state != "loading"
        else {"phase": process.progress.phase, "share": process.progress.share},
        "requests": ages,
        "expires_in": round(max(0.0, (slot.keep_alive or 0.0) - (now - slot.used)), 3) if idle else None,
        "memory": None if process is None or slot.state == "failed" else process.memory(),
        "context": slot.context(),
        "parameters": None if about is None else about.parameters,
        "kind": None if about is None else about.kind,
        "format": None if about is None else about.format,
        "tools": None if about is None else about.tools,
        "seqs": None if about is None else about.seqs,
        "budget": None if about is None else about.budget,
        "defaults": None if about is None else about.defaults,
        "stats": (process.stats or None) if process is not None and about is not None else None,
    }


def _is(state: State, name: str, slot: Slot) -> bool:
    found = state.models.known(name)
    return found is not None and found[0] is slot
