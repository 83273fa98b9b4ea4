"""`POST /v1/chat/completions`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from herd.errors import HerdError
from herd.server.errors import ApiError, error_body, told
from herd.server.fields import body_of, checked, content_of
from herd.server.openai.chat_body import ChatBody, ChatMessage, ContentPart, NamedTool
from herd.server.openai.replies import chat_logprob, prompt_logprobs, timings, truncation, usage
from herd.server.openai.sampling import check_sampling, sampling_of
from herd.server.openai.seen import Seen, seen_of, shows, unseen
from herd.server.protocol import Began, Call, Chat, Ended, Event, Finished, Piece, Usage
from herd.server.providers.relay import relayed
from herd.server.sse import DONE, EventStream, TextFrame, event, until_gone
from herd.server.state import State, begun, new_id, state_of

__all__ = ["call_of", "check_told", "check_work", "longest", "message_of", "note_of", "router", "size_of"]

router = APIRouter(tags=["openai"])
UNKNOWN_CONTEXT = 1 << 17
"""Tokens of a context while the model is not loaded: most have no longer one."""
_NOTHING: Seen = {}


@router.post(
    "/v1/chat/completions", summary="Answer a conversation", openapi_extra=body_of(ChatBody), response_model=None
)
async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions, with vLLM's extra fields."""
    state = state_of(request)
    content = await content_of(request)
    if (provider := state.providers.of(content)) is not None:
        return await relayed(request, provider, "chat/completions", content)
    body = checked(content, ChatBody)
    seen = await until_gone(request, seen_of(state, body.model, body.messages)) if shows(body.messages) else {}
    if seen is None:
        return Response(status_code=499)
    call = call_of(body, state, seen)
    events = state.run(body.model, call)
    if body.stream:
        began = await until_gone(request, begun(events))
        if began is None:
            return Response(status_code=499)
        answer = _Answer(state, body, call.id, began)
        return EventStream(answer.stream(events), headers=answer.headers, ping_seconds=state.settings.ping_seconds)
    return await until_gone(request, _whole(state, body, call, events)) or Response(status_code=499)


def call_of(body: ChatBody, state: State, seen: Seen = _NOTHING) -> Call:
    """The call of a request, with its images as they were `seen`. Raises ApiError (400) for what cannot be honoured."""
    sampling = sampling_of(body)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if most is not None:
        sampling["max_tokens"] = most
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    if body.response_format is not None and body.response_format.type != "text":
        form = body.response_format
        if any(name in sampling for name in ("schema", "regex", "choices", "grammar", "json_object")):
            raise ApiError(400, "response_format: a reply can be held to one form only", param="response_format")
        sampling |= {"json_object": True} if form.json_schema is None else {"schema": form.json_schema.schema_}
    check_sampling(sampling, max_tokens="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens")
    messages = tuple(message_of(m, i, seen) for i, m in enumerate(body.messages))
    tools = tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ())
    characters = size_of(messages, tools)
    check_work(state, body.n or 1, characters, "messages")
    if body.prompt_logprobs is not None:
        most_told = state.settings.max_prompt_told
        check_told(state, characters * (body.prompt_logprobs + 1), "prompt_logprobs", most_told)
    if body.logprobs and not body.stream:
        told = (body.n or 1) * min(most or longest(state, body.model), longest(state, body.model))
        check_told(state, told * ((body.top_logprobs or 0) + 1), "top_logprobs")
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    form = None if body.response_format is None else body.response_format.json_schema
    chosen = "named" if named is not None else body.tool_choice or "auto"
    assert chosen in ("auto", "none", "required", "named")
    chat = Chat(
        messages=messages,
        tools=tools,
        tool_choice=chosen,  # type: ignore[arg-type]
        tool_name=named,
        parallel=body.parallel_tool_calls is not False,
        continue_final=bool(body.continue_final_message),
        generation_prompt=body.add_generation_prompt is not False,
        format_options=body.chat_template_kwargs or {},
        truncate=body.truncation == "auto",
        note=note_of(form.name, form.description) if form is not None else "",
    )
    return Call(new_id("chatcmpl-"), chat, sampling, salt=body.cache_salt or "")


def check_work(state: State, count: int, size: int, param: str) -> None:
    """Raise ApiError (400) for prompts that are copied too often."""
    if count * size > state.settings.max_prompt_work:
        raise ApiError(
            400,
            f"{count} replies to prompts of {size:,} characters or ids together are more than this server takes at once "
            f"({state.settings.max_prompt_work:,}): send less, or fewer",
            param=param,
            code="too_much_work",
        )


def note_of(name: str | None, description: str | None) -> str:
    """What the model is told of the form of its reply."""
    return f"Reply in the form {name}: {description}" if description else ""


def size_of(messages: Iterable[Mapping[str, Any]], tools: Iterable[Any] = ()) -> int:
    """Characters of a conversation: texts, calls of tools, and the tools."""
    said = sum(_said(m["content"]) + len(str(m.get("tool_calls", ""))) for m in messages)
    return said + sum(len(str(tool)) for tool in tools)


def _said(content: Any) -> int:
    """Characters of a message, without those that images are written in: these have a limit of their own."""
    if isinstance(content, str):
        return len(content)
    return sum(len(str(part)) for part in content if part.get("type") != "image_url")


def check_told(state: State, told: int, param: str, most: int | None = None) -> None:
    """Raise ApiError (400) for answers whose logprobs are more than is held at once, or than `most`."""
    most = state.settings.max_prompt_work if most is None else most
    if told > most:
        raise ApiError(
            400,
            f"{param}: up to {told:,} of them would be told, and one answer tells {most:,}: "
            "ask for fewer, for fewer tokens or replies, or for a stream",
            param=param,
            code="too_much_work",
        )


def longest(state: State, name: str) -> int:
    """Most tokens of a reply of the model that clients call `name`. Raises UnknownModelError."""
    slot, adapter = state.models.find(name)
    if (context := slot.context(adapter)) is not None:
        return context
    return slot.spec.options.max_len or UNKNOWN_CONTEXT


def message_of(message: ChatMessage, index: int, seen: Seen = _NOTHING) -> dict[str, Any]:
    """A message as the worker reads it. Raises ApiError (400) for an image that was not `seen`."""
    content: Any = message.content
    if isinstance(content, list):
        content = [_part(part, f"messages[{index}].content[{i}]", seen) for i, part in enumerate(content)]
    out: dict[str, Any] = {"role": message.role, "content": content or ""}
    if message.tool_calls:
        out["tool_calls"] = [
            {"type": "function", "id": call.id, "function": call.function.model_dump()} for call in message.tool_calls
        ]
    for name in ("tool_call_id", "name"):
        if getattr(message, name) is not None:
            out[name] = getattr(message, name)
    return out


def _part(part: ContentPart, where: str, seen: Seen) -> dict[str, Any]:
    if part.type != "image_url":
        return {"type": "text", "text": part.text if part.type == "text" else part.refusal}
    if where not in seen:
        raise unseen(where)
    return {"type": "image_url", "image_url": {"url": seen[where]}}


async def _whole(state: State, body: ChatBody, call: Call, events: AsyncGenerator[Event, None]) -> Response:
    """The answer when it is complete."""
    async with contextlib.aclosing(events):
        answer = _Answer(state, body, call.id, await begun(events))
        async for one in events:
            answer.take(one)
    return JSONResponse(answer.whole(), headers=answer.headers)


class _Answer:
    """The answer while it grows."""

    def __init__(self, state: State, body: ChatBody, id: str, began: Began) -> None:
        self.body, self.began = body, began
        about = state.models.find(body.model)[0].about
        self.head = {
            "id": id,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": None if about is None else about.fingerprint,
        }
        self.choices = [_Choice() for _ in range(body.n or 1)]
        self.usage: Usage | None = None
        self.prompt: list[Any] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What a client should know at once."""
        left = self.began.truncated
        if left is None:
            return {}
        return {"X-Herd-Truncated": f"messages={left.dropped_messages}; tokens={left.dropped_tokens}"}

    def take(self, one: Event) -> None:
        """The next event."""
        if isinstance(one, Piece):
            if one.prompt:
                self.prompt = prompt_logprobs(one.prompt)
            self.choices[one.index].take(one)
        elif isinstance(one, Ended):
            self.choices[one.index].ended = one
        elif isinstance(one, Finished):
            self.usage = one.usage

    def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        assert self.usage is not None
        out = {
            **self.head,
            "object": "chat.completion",
            "choices": [choice.whole(i, bool(self.body.logprobs)) for i, choice in enumerate(self.choices)],
            "usage": usage(self.usage),
            "timings": timings(self.usage),
            **truncation(self.began),
        }
        if self.prompt is not None:
            out["prompt_logprobs"] = self.prompt
        return out

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
        """The answer as server-sent events. An error on the way is an event, too."""
        texts = [TextFrame(lambda text, i=i: self._chunk(i, {"content": text})) for i in range(len(self.choices))]
        try:
            async with contextlib.aclosing(events):
                for i in range(len(self.choices)):
                    yield self._chunk(i, {"role": "assistant", "content": ""}, extra=truncation(self.began))
                async for one in events:
                    self.take(one)
                    if isinstance(one, Piece):
                        if one.prompt:
                            yield event({**self.head, **_CHUNK, "choices": [], "prompt_logprobs": self.prompt})
                        if one.text and one.tool is None and not one.tokens:
                            yield texts[one.index](one.text)
                        elif one.text or one.tool is not None or one.tokens:
                            yield self._piece(one)
                    elif isinstance(one, Ended):
                        yield self._chunk(one.index, {}, one)
            options = self.body.stream_options
            assert self.usage is not None
            if options is not None and options.include_usage:
                counts = {"usage": usage(self.usage), "timings": timings(self.usage)}
                yield event({**self.head, **_CHUNK, "choices": [], **counts})
        except HerdError as error:
            yield event(error_body(told(error, "a stream of chat completions"), "openai"))
        yield DONE

    def _piece(self, piece: Piece) -> bytes:
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if (tool := piece.tool) is not None:
            function: dict[str, Any] = {"arguments": tool.arguments}
            call: dict[str, Any] = {"index": tool.number, "function": function}
            if tool.name is not None:
                call |= {"id": tool.id, "type": "function", "function": {"name": tool.name, "arguments": ""}}
            delta["tool_calls"] = [call]
        told = [chat_logprob(token) for token in piece.tokens]
        return self._chunk(piece.index, delta, logprobs={"content": told, "refusal": None} if told else None)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        ended: Ended | None = None,
        *,
        logprobs: Any = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if ended is not None:
            choice |= {"finish_reason": ended.reason, "stop_reason": ended.detail}
        return event({**self.head, **_CHUNK, "choices": [choice], **(extra or {})})


_CHUNK = {"object": "chat.completion.chunk"}


class _Choice:
    """One choice while it grows."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.ended: Ended | None = None

    def take(self, piece: Piece) -> None:
        """More of it."""
        if piece.text:
            self.text.append(piece.text)
        self.logprobs += map(chat_logprob, piece.tokens)
        if (tool := piece.tool) is not None:
            if tool.name is not None:
                self.calls.append({"id": tool.id, "type": "function", "function": {"name": tool.name, "arguments": ""}})
            self.calls[tool.number]["function"]["arguments"] += tool.arguments

    def whole(self, index: int, logprobs: bool) -> dict[str, Any]:
        """It as an object."""
        assert self.ended is not None
        text = "".join(self.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls:
            message |= {"content": text or None, "tool_calls": self.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": self.logprobs, "refusal": None} if logprobs else None,
            "finish_reason": self.ended.reason,
            "stop_reason": self.ended.detail,
        }
