"""`POST /api/generate`."""

from __future__ import annotations

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from herd.errors import PromptError
from herd.server.errors import ApiError
from herd.server.fields import body_of
from herd.server.ollama.chat import loaded
from herd.server.ollama.fields import ReplyBody, check_context, keep, lasting, read, sampling_of
from herd.server.ollama.lines import Answer, Begun, answered
from herd.server.openai.chat import check_work
from herd.server.protocol import Call, Chat, Ready, Text
from herd.server.state import begun, new_id, state_of

__all__ = ["router"]

router = APIRouter(tags=["ollama"])


class GenerateBody(ReplyBody):
    """A prompt. It is a user's message of a chat, unless it is `raw`, has a `suffix`, or the model has no chat format."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None

    refused: ClassVar = dict(ReplyBody.refused) | {
        "template": "templates are not executed: with raw the prompt is taken as it is",
        "images": "this model reads text only: leave it out",
    }
    neutral: ClassVar = dict(ReplyBody.neutral) | {"truncate": (False,)}


@router.post("/api/generate", summary="Answer a prompt", openapi_extra=body_of(GenerateBody), response_model=None)
async def generate(request: Request) -> Response:
    """Ollama's generate."""
    state = state_of(request)
    body = await read(request, GenerateBody)
    sampling, seconds = sampling_of(body), lasting(state, body.model, body.keep_alive)
    if not body.prompt and not body.suffix:
        return await loaded(request, state, body.model, seconds, {"response": ""})
    if body.system and (body.raw or body.suffix is not None):
        raise ApiError(400, "system: a prompt that is taken as it is has no place for it", param="system")
    check_work(state, 1, len(body.prompt or "") + len(body.suffix or ""), "prompt")

    answer = Answer(body.model, lambda text, calls: {"response": text})

    async def begin() -> Begun:
        about = await state.about(body.model)
        check_context(body.options, about)
        answer.loaded()
        events = state.run(body.model, Call(new_id("gen-"), _prompt(body, about), sampling))
        began = await begun(events)
        keep(state.models.find(body.model)[0], seconds)
        return began, events

    return await answered(request, answer, begin, body.stream is not False)


def _prompt(body: GenerateBody, about: Ready) -> Chat | Text:
    prompt = body.prompt or ""
    if body.suffix:
        if not about.infill:
            raise PromptError(f"suffix: {body.model} does not fill in the middle, which Code Llama 7B and 13B do")
        return Text(prompt, body.suffix)
    if body.raw or about.format is None:
        if body.system:
            raise ApiError(400, f"system: {body.model} has no chat format: put it before the prompt", param="system")
        return Text(prompt)
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.system}] if body.system else []
    return Chat(messages=(*messages, {"role": "user", "content": prompt}))
