"""`POST /api/chat`."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from herd.server.errors import ApiError
from herd.server.fields import LIMITS, Body, body_of
from herd.server.ollama.fields import ReplyBody, check_context, keep, lasting, read, sampling_of
from herd.server.ollama.lines import Answer, Begun, answered, moment
from herd.server.openai.chat import check_work, size_of
from herd.server.openai.chat_body import FunctionName
from herd.server.protocol import Call, Chat
from herd.server.sse import until_gone
from herd.server.state import State, begun, new_id, state_of

__all__ = ["router"]

router = APIRouter(tags=["ollama"])


class Called(Body):
    """A function that was called."""

    name: FunctionName
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: int | None = None


class ToolCallBody(Body):
    """A call of an earlier reply."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: Called


class OllamaMessage(Body):
    """A message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    refused: ClassVar = {}

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, given: Any) -> Any:
        """What clients send back of a reply, and what it says is nothing."""
        if not isinstance(given, dict):
            return given
        if given.get("images"):
            raise ValueError("images: this model reads text only, leave them out")
        if given.get("thinking"):
            raise ValueError("thinking: Llama models do not think apart, leave it out")
        given = {k: v for k, v in given.items() if k not in ("images", "thinking")}
        if given.get("role") == "tool" and "name" in given and "tool_name" not in given:
            given["tool_name"] = given.pop("name")
        return given

    @model_validator(mode="after")
    def _fits(self) -> OllamaMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only assistant messages have tool_calls")
        if (self.tool_name or self.tool_call_id) and self.role != "tool":
            raise ValueError("only tool messages have a tool_name")
        return self


class OllamaFunction(Body):
    """A function that may be called."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OllamaTool(Body):
    """A tool."""

    type: Literal["function"] = "function"
    function: OllamaFunction


class OllamaChatBody(ReplyBody):
    """A chat. Without messages the model is loaded, or with `keep_alive` 0 unloaded."""

    messages: list[OllamaMessage] | None = Field(None, max_length=LIMITS["messages"])
    tools: list[OllamaTool] | None = Field(None, max_length=LIMITS["tools"])
    truncate: bool | None = None


@router.post("/api/chat", summary="Answer a conversation", openapi_extra=body_of(OllamaChatBody), response_model=None)
async def chat(request: Request) -> Response:
    """Ollama's chat."""
    state = state_of(request)
    body = await read(request, OllamaChatBody)
    sampling, seconds = sampling_of(body), lasting(state, body.model, body.keep_alive)
    if not body.messages:
        return await loaded(request, state, body.model, seconds, {"message": {"role": "assistant", "content": ""}})
    messages = tuple(_message(message) for message in body.messages)
    check_work(state, 1, size_of(messages, body.tools or ()), "messages")
    call = Call(
        new_id("chat-"),
        Chat(
            messages=messages,
            tools=tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ()),
            truncate=body.truncate is True,
        ),
        sampling,
    )

    answer = Answer(body.model, _told)

    async def begin() -> Begun:
        check_context(body.options, await state.about(body.model))
        answer.loaded()
        events = state.run(body.model, call)
        began = await begun(events)
        keep(state.models.find(body.model)[0], seconds)
        return began, events

    return await answered(request, answer, begin, body.stream is not False)


async def loaded(request: Request, state: State, model: str, seconds: float | None, told: dict[str, Any]) -> Response:
    """What a request without a prompt does: the model is loaded, or with 0 seconds unloaded."""
    slot, _ = state.models.find(model)
    if seconds == 0:
        await state.models.release(model)
        why = "unload"
    else:
        if await until_gone(request, state.about(model)) is None:
            return Response(status_code=499)
        keep(slot, seconds)
        why = "load"
    return JSONResponse({"model": model, "created_at": moment(), **told, "done": True, "done_reason": why})


def _told(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}


def _message(message: OllamaMessage) -> dict[str, Any]:
    if message.content is None and not message.tool_calls:
        raise ApiError(400, f"a {message.role} message has content", param="messages")
    out: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(call.function.arguments, ensure_ascii=False),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_name is not None:
        out["name"] = message.tool_name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    return out
