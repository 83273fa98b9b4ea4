"""`/api/tags`, `/api/ps`, `/api/show`, `/api/version`: which models there are, which are loaded, and what they are."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from herd import __version__
from herd.hub.created import Created, find
from herd.hub.found import Found
from herd.server.errors import ApiError
from herd.server.fields import Body, body_of
from herd.server.here import digest, here
from herd.server.models import Slot
from herd.server.ollama.facts import Facts, facts_of
from herd.server.ollama.fields import read
from herd.server.ollama.lines import moment
from herd.server.state import state_of

__all__ = ["router"]

router = APIRouter(tags=["ollama"])
NEVER = "9999-12-31T23:59:59Z"
"""When a model is unloaded that is not unloaded."""


class ShowBody(Body):
    """Which model is shown. `verbose` adds nothing: all there is, is told."""

    model: str | None = Field(None, max_length=512)
    name: str | None = Field(None, max_length=512)
    verbose: bool | None = None


@router.get("/api/version", summary="The version of herd")
async def version() -> dict[str, str]:
    """The version of herd."""
    return {"version": __version__}


@router.get("/api/tags", summary="The models that can be asked for")
async def tags(request: Request) -> dict[str, Any]:
    """Every model by name, loaded or not."""
    state = state_of(request)
    known = {name: slot for name, slot, adapter in state.models.names() if adapter is None}
    rows = {name: _row(name, slot) for name, slot in known.items()}
    if state.settings.any_model:
        for model in await asyncio.to_thread(lambda: list(here())):
            row = _found(model)
            if model.name in rows:  # what is loaded is known better
                known_better = {key: value for key, value in rows[model.name]["details"].items() if value}
                row["details"] |= known_better
            rows[model.name] = row
    return {"models": list(rows.values())}


@router.get("/api/ps", summary="The models that are loaded")
async def ps(request: Request) -> dict[str, Any]:
    """Loaded models: the memory that their processes take, measured, and when they are unloaded."""
    models = state_of(request).models
    digests: dict[str, str] = {}
    if models.settings.any_model:  # those of /api/tags
        digests = await asyncio.to_thread(lambda: {model.name: digest(model) for model in here()})
    out = []
    for row in models.rows():
        slot = models.slots[row["name"]]
        left = row["expires_in"]
        busy = left is None and slot.keep_alive is not None
        until = time.time() + (slot.keep_alive or 0) if busy else None if left is None else time.time() + left
        out.append(
            _row(row["name"], slot)
            | ({"digest": digests[row["name"]]} if row["name"] in digests else {})
            | {
                "size": (row["memory"] or 0) + (row["device_memory"] or 0),
                "size_vram": row["device_memory"] or 0,
                "context_length": row["context"] or 0,
                "expires_at": NEVER if until is None else moment(until),
                "state": row["state"],
                "requests": row["requests"],
                "device": row["device"],
            }
        )
    return {"models": out}


@router.post("/api/show", summary="What a model is", openapi_extra=body_of(ShowBody))
async def show(request: Request) -> dict[str, Any]:
    """A model's files, parameters, prompt format and capabilities. It is not loaded for that."""
    body = await read(request, ShowBody)
    if body.model and body.name and body.model != body.name:
        raise ApiError(400, "name is not model: give one of them", param="name", code="invalid_value")
    name = body.model or body.name
    if not name:
        raise ApiError(400, "model is missing", param="model", code="missing_required_parameter")
    models = state_of(request).models
    await models.meet(name)
    slot, adapter = models.find(name)
    made = await asyncio.to_thread(find, slot.spec.source)
    facts = await facts_of(slot.spec)
    about = slot.about
    format = (about.format if about is not None else None) or slot.spec.options.format or facts.format
    context = facts.context if about is None else slot.context(adapter)
    info = {
        "general.architecture": "llama",
        "general.parameter_count": facts.parameters,
        "llama.context_length": facts.context,
        "llama.embedding_length": facts.dim,
        "llama.block_count": facts.layers,
        "llama.attention.head_count": facts.heads,
        "llama.attention.head_count_kv": facts.kv_heads,
        "llama.vocab_size": facts.vocabulary,
        "herd.context_length": context,
        "herd.prompt_format": format,
    }
    return {
        "modelfile": made.modelfile if made is not None and made.modelfile else f"FROM {slot.spec.name}\n",
        "parameters": _parameters(made),
        "template": format or "",
        "system": slot.spec.system,
        "license": "\n\n".join(made.licenses) if made is not None else "",
        "messages": [{"role": role, "content": text} for role, text in slot.spec.beginning],
        "details": _details(facts, slot),
        "model_info": {key: value for key, value in info.items() if value is not None},
        "capabilities": _capabilities(slot, format),
        "modified_at": moment(made.created if made is not None else slot.created),
    }


def _capabilities(slot: Slot, format: str | None) -> list[str]:
    about = slot.about
    tools = about.tools if about is not None else format is not None and format.startswith(_TOOLS)
    return ["completion", *(["tools"] if tools else []), *(["insert"] if about is not None and about.infill else [])]


_TOOLS = ("llama3.1", "llama3.2", "llama3.3", "llama4")


def _parameters(made: Created | None) -> str:
    """Lines as in a Modelfile."""
    lines = []
    for name, value in () if made is None else made.params.items():
        for one in value if isinstance(value, tuple) else (value,):
            lines.append(f"{_THEIRS.get(name, name):<20} {-1 if one is None else one}")
    if made is not None and made.context is not None:
        lines.append(f"{'num_ctx':<20} {made.context}")
    return "\n".join(lines)


_THEIRS = {"repetition_penalty": "repeat_penalty", "max_tokens": "num_predict"}


def _row(name: str, slot: Slot) -> dict[str, Any]:
    """A model that the server knows."""
    told = f"{slot.spec.source} {slot.spec.lora} {slot.spec.system}"
    return {
        "name": name,
        "model": name,
        "modified_at": moment(slot.created),
        "size": 0,
        "digest": hashlib.sha256(told.encode()).hexdigest(),
        "details": _details(Facts(), slot),
    }


def _found(model: Found) -> dict[str, Any]:
    """A model of this machine."""
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": moment(model.modified),
        "size": model.size,
        "digest": digest(model),
        "details": {
            "parent_model": "",
            "format": model.format or "",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "",
            "quantization_level": model.quant or "",
        },
    }


def _details(facts: Facts, slot: Slot) -> dict[str, Any]:
    about = slot.about
    parameters = about.parameters if about is not None else facts.parameters
    return {
        "parent_model": "",
        "format": facts.kind or "",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "" if not parameters else _short(parameters),
        "quantization_level": (about.kind if about is not None else facts.numbers) or "",
    }


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
