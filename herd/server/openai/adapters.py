"""Adapters of a running server: vLLM's load_lora_adapter and unload_lora_adapter, llama.cpp's lora-adapters.

The names are those of LoRA, and adapters of virtual tokens (prefix and prompt tuning) come and go through them as well.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field

from herd.server.errors import ApiError
from herd.server.fields import Body, body_of, parse
from herd.server.here import pathless
from herd.server.jsonbody import strict_json
from herd.server.models import Slot
from herd.server.openai.tokenize import the_model
from herd.server.process import WorkerError
from herd.server.state import State, state_of

__all__ = ["LoadAdapterBody", "UnloadAdapterBody", "router"]

router = APIRouter(tags=["vllm"])
Name = Annotated[str, Field(min_length=1, max_length=256)]


class LoadAdapterBody(Body):
    """An adapter that is wanted: a PEFT folder or a GGUF file below the server's folder of adapters."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None

    refused: ClassVar = {
        "base_model_name": "call it model",
        "is_3d_lora_weight": "adapters are of matrices: leave it out",
    }
    neutral: ClassVar = {"load_inplace": (False,)}


class UnloadAdapterBody(Body):
    """An adapter that is not wanted any more."""

    lora_name: Name
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None

    refused: ClassVar = {"lora_int_id": "adapters are known by their names: leave it out"}


@router.post("/v1/load_lora_adapter", summary="Add an adapter", openapi_extra=body_of(LoadAdapterBody))
async def load(request: Request) -> PlainTextResponse:
    """vLLM's: from now on `lora_name` is a model."""
    state = state_of(request)
    body = await parse(request, LoadAdapterBody)
    path = _path(state, body.lora_path)
    _check_name(state, body.lora_name)
    async with state.models.use(_base(state, body.model)) as (slot, process, _):
        if body.lora_name in slot.adapters:
            what = f"adapter {body.lora_name!a} is loaded already: unload it first, or choose another name"
            raise ApiError(400, what, param="lora_name", code="invalid_value")
        try:
            said = await process.ask("load_adapter", name=body.lora_name, path=str(path))
        except WorkerError as error:
            if error.kind in ("CheckpointError", "ConfigError", "ConfigFileError"):
                what = pathless(str(error).replace(f"{_folder(state)}{os.sep}", ""))
                raise ApiError(400, what, param="lora_path", code="invalid_value") from None
            raise
        slot.adapters[body.lora_name] = str(path)
        slot.changed = said["context"], said["rooms"]
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", summary="Forget an adapter", openapi_extra=body_of(UnloadAdapterBody))
async def unload(request: Request) -> PlainTextResponse:
    """vLLM's. Requests that use it must have ended."""
    state = state_of(request)
    body = await parse(request, UnloadAdapterBody)
    _folder(state)
    name = _base(state, body.model)
    slot, _ = state.models.find(name)
    if body.lora_name not in slot.adapters:
        known = ", ".join(slot.adapters) or "none"
        raise ApiError(404, f"there is no adapter {body.lora_name!a}: loaded are {known}", param="lora_name")
    if slot.about is not None:
        async with state.models.use(name) as (_, process, _):
            try:
                said = await process.ask("unload_adapter", name=body.lora_name)
            except WorkerError as error:
                if error.kind == "ConfigError":  # requests with it have not ended
                    raise ApiError(409, str(error), param="lora_name", code="adapter_in_use") from None
                raise
            slot.changed = said["context"], said["rooms"]
    slot.adapters.pop(body.lora_name, None)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/lora-adapters", summary="The adapters")
async def listed(request: Request, model: str | None = None) -> list[dict[str, Any]]:
    """llama.cpp's list. The scale of all is 0: no request has one that does not name it."""
    state = state_of(request)
    await state.models.meet(model or "")
    slot, _ = state.models.find(_base(state, model))
    return _rows(slot)


@router.post("/lora-adapters", summary="Nothing but what is so already")
async def scaled(request: Request, model: str | None = None) -> list[dict[str, Any]]:
    """llama.cpp's scales for all requests: here each request chooses, so every scale stays 0."""
    state = state_of(request)
    await state.models.meet(model or "")
    slot, _ = state.models.find(_base(state, model))
    given = strict_json(await request.body())
    if not isinstance(given, list) or not all(isinstance(one, dict) and set(one) == {"id", "scale"} for one in given):
        raise ApiError(400, "the body is a list of objects with id and scale", code="invalid_type")
    names = list(slot.adapters)
    for i, one in enumerate(given):
        if type(one["id"]) is not int or not 0 <= one["id"] < len(names):
            raise ApiError(400, f"[{i}].id: there are {len(names)} adapters", param=f"[{i}].id", code="invalid_value")
        if type(one["scale"]) not in (int, float) or not math.isfinite(one["scale"]):
            raise ApiError(400, f"[{i}].scale: expected a number", param=f"[{i}].scale", code="invalid_type")
        if one["scale"] != 0:
            name = names[one["id"]]
            what = (
                f"[{i}].scale: adapters are not laid over everybody's requests here: a request has this one, at its own scale, "
                f"when it asks for the model {name!a}"
            )
            raise ApiError(400, what, param=f"[{i}].scale", code="unsupported_parameter")
    return _rows(slot)


def _rows(slot: Slot) -> list[dict[str, Any]]:
    # Where they lie is for nobody to know: the last part tells files apart.
    return [
        {"id": i, "name": name, "path": Path(path).name, "scale": 0.0}
        for i, (name, path) in enumerate(slot.adapters.items())
    ]


def _base(state: State, name: str | None) -> str:
    """The model that an adapter is for, by its own name. Raises ApiError (400) when that is another adapter."""
    found = the_model(state, name)
    slot, adapter = state.models.find(found)
    if adapter is not None and adapter in slot.adapters:
        what = f"{found[:80]!a} is an adapter itself: name its base model"
        raise ApiError(400, what, param="model", code="invalid_value")
    return slot.spec.name


def _folder(state: State) -> Path:
    if state.settings.adapter_dir is None:
        what = "adapters are not changed while this server runs: start it with --adapter-dir FOLDER to allow it"
        raise ApiError(403, what, code="not_configured")
    return Path(state.settings.adapter_dir).resolve()


def _path(state: State, given: str) -> Path:
    """What a client's path means below the folder of adapters, links followed. Raises ApiError (400, 403)."""
    folder = _folder(state)
    try:
        found = (folder / given).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        found = None
    # One answer for both: nobody learns what there is elsewhere.
    if found is None or not found.is_relative_to(folder) or found == folder:
        what = f"lora_path: there is no {given[:200]!a} in the server's folder of adapters"
        raise ApiError(400, what, param="lora_path", code="invalid_value")
    return found


def _check_name(state: State, name: str) -> None:
    if (provider := state.settings.provider_of(name)) is not None:
        what = f"lora_name: names with {provider.name}/ are those of a provider"
        raise ApiError(400, what, param="lora_name", code="invalid_value")
    if not name.isprintable() or "@" in name:
        what = "lora_name: names are printable, without @"
        raise ApiError(400, what, param="lora_name", code="invalid_value")
    if any(name == known for known, _, adapter in state.models.names() if adapter is None):
        raise ApiError(400, f"lora_name: a model is called {name!a}", param="lora_name", code="invalid_value")
