"""`POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from herd.server.anthropic.calls import call_of, chat_of
from herd.server.anthropic.fields import CountBody, MessagesBody
from herd.server.anthropic.replies import PING, Answer
from herd.server.errors import ApiError
from herd.server.fields import body_of, parse
from herd.server.openai.chat import check_work, size_of
from herd.server.protocol import Call, Event
from herd.server.sse import EventStream, until_gone
from herd.server.state import State, begun, state_of

__all__ = ["router"]

router = APIRouter(tags=["anthropic"])
VERSIONS = ("2023-06-01", "2026-10-21")
"""They differ in what they refuse. temperature, top_p and top_k are taken in both: Llama models have them."""
Beta = Literal["true", "false"] | None
"""Clients of the beta API say ?beta=true, which changes no path and no field."""


@router.post("/v1/messages", summary="Answer a conversation", openapi_extra=body_of(MessagesBody), response_model=None)
async def messages(request: Request, beta: Beta = None) -> Response:
    """Anthropic's messages."""
    _check_version(request)
    state = state_of(request)
    body = await parse(request, MessagesBody)
    call = call_of(body, state)
    events = state.run(body.model, call)
    if body.stream:
        began = await until_gone(request, begun(events))
        if began is None:
            return Response(status_code=499)
        answer = Answer(call.id, body.model, began)
        return EventStream(answer.stream(events), ping_seconds=state.settings.ping_seconds, ping=PING)
    return await until_gone(request, _whole(body.model, call, events)) or Response(status_code=499)


async def _whole(model: str, call: Call, events: AsyncGenerator[Event, None]) -> Response:
    async with contextlib.aclosing(events):
        answer = Answer(call.id, model, await begun(events))
        async for one in events:
            answer.take(one)
    return JSONResponse(answer.whole())


@router.post("/v1/messages/count_tokens", summary="Count the tokens of a prompt", openapi_extra=body_of(CountBody))
async def count_tokens(request: Request, beta: Beta = None) -> Response:
    """How many tokens the prompt of such a request has. The model is loaded for that."""
    _check_version(request)
    state = state_of(request)
    body = await parse(request, CountBody)
    counted = await until_gone(request, _counted(state, body))
    return Response(status_code=499) if counted is None else JSONResponse({"input_tokens": counted})


async def _counted(state: State, body: CountBody) -> int:
    chat = chat_of(body)
    check_work(state, 1, size_of(chat.messages, chat.tools), "messages")
    slot, _ = state.models.find(body.model)
    told: dict[str, Any] = await state.ask(body.model, "count", chat=asdict(slot.spec.opened(chat)))
    return told["count"]


def _check_version(request: Request) -> None:
    """Raise ApiError for another version of the API: its events had other names."""
    version = request.headers.get("anthropic-version", VERSIONS[0])
    if version not in VERSIONS:
        raise ApiError(
            400,
            f"anthropic-version is {version[:40]!a}: this server speaks {' and '.join(VERSIONS)}",
            param="anthropic-version",
        )
