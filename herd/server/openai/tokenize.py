"""`POST /tokenize` and `/detokenize`, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from herd.chat.params import MAX_INT
from herd.server.errors import ApiError
from herd.server.fields import LIMITS, Body, body_of, parse
from herd.server.openai.chat import check_work, message_of, size_of
from herd.server.openai.chat_body import ChatMessage, Tool
from herd.server.protocol import Chat
from herd.server.sse import until_gone
from herd.server.state import State, state_of

__all__ = ["DetokenizeBody", "TokenizeBody", "router", "the_model"]

router = APIRouter(tags=["vllm"])
Name = Annotated[str, Field(min_length=1, max_length=512)]


class TokenizeBody(Body):
    """A text or a conversation whose ids are wanted. `model` may be left out when there is only one."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=LIMITS["messages"])
    tools: list[Tool] | None = Field(None, max_length=LIMITS["tools"])
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    refused: ClassVar = {
        "chat_template": "templates come from the model, not from requests",
        "content": "this is vLLM's /tokenize, not llama.cpp's: call it prompt",
        "mm_processor_kwargs": "images are not supported: leave it out",
    }
    neutral: ClassVar = {"continue_final_message": (False,), "chat_template_kwargs": ({},)}

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is None and (self.tools is not None or self.add_generation_prompt is not None):
            raise ValueError("tools and add_generation_prompt go with messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens: conversations have theirs from the prompt format, leave it out")
        return self


class DetokenizeBody(Body):
    """Ids whose text is wanted."""

    model: Name | None = None
    tokens: list[Annotated[int, Field(ge=0, le=MAX_INT)]] = Field(max_length=LIMITS["ids"])


@router.post("/tokenize", summary="The ids of a text or a conversation", openapi_extra=body_of(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """vLLM's /tokenize."""
    state = state_of(request)
    body = await parse(request, TokenizeBody)
    name = the_model(state, body.model)
    messages = None
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    check_work(state, 1, len(body.prompt or ""), "prompt")
    if (most := state.settings.max_prompt_told) < (size := len(body.prompt or "")):
        what = f"prompt has {size:,} characters, and the ids of {most:,} are told at once: send it in parts"
        raise ApiError(400, what, param="prompt", code="too_much_work")
    if body.messages is not None:
        chat = Chat(messages=tuple(message_of(m, i) for i, m in enumerate(body.messages)))
        check_work(state, 1, size_of(chat.messages, tools), "messages")
        messages = state.models.find(name)[0].spec.opened(chat).messages
    asked = state.ask(
        name,
        "tokenize",
        text=body.prompt,
        messages=messages,
        tools=tools,
        special=body.add_special_tokens is not False,
        generate=body.add_generation_prompt is not False,
        pieces=bool(body.return_token_strs),
    )
    found = await until_gone(request, asked)
    if found is None:
        return Response(status_code=499)
    out: dict[str, Any] = {"count": found["count"], "max_model_len": found["context"], "tokens": found["tokens"]}
    return JSONResponse(out | {"token_strs": found.get("pieces")})


@router.post("/detokenize", summary="The text of ids", openapi_extra=body_of(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """vLLM's /detokenize. Special tokens stand as their names."""
    state = state_of(request)
    body = await parse(request, DetokenizeBody)
    asked = state.ask(the_model(state, body.model), "detokenize", tokens=body.tokens, special=True)
    text = await until_gone(request, asked)
    return Response(status_code=499) if text is None else JSONResponse({"prompt": text})


def the_model(state: State, name: str | None) -> str:
    """The model that a request means when it names none. Raises ApiError (400) when that is not clear."""
    if name is not None:
        return name
    slots = list(state.models.slots)
    if len(slots) == 1:
        return slots[0]
    raise ApiError(
        400, "model is missing: there is more than one here", param="model", code="missing_required_parameter"
    )
