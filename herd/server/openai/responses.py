"""`/v1/responses`: replies that can be come back to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from herd.errors import HerdError
from herd.server.errors import ApiError, api_error, told
from herd.server.fields import LIMITS, body_of, checked, parse
from herd.server.openai.chat import check_work, note_of, size_of
from herd.server.openai.response_body import (
    LOGPROBS,
    AllowedTools,
    FunctionTool,
    NamedFunction,
    ResponseBody,
    refuse_tool,
)
from herd.server.openai.response_events import Growing
from herd.server.openai.response_items import items_from, messages_from_items
from herd.server.openai.sampling import check_sampling, sampling_of
from herd.server.process import WorkerError
from herd.server.protocol import Began, Call, Chat, Event
from herd.server.sse import EventStream, event, until_gone
from herd.server.state import State, begun, new_id, state_of
from herd.server.stored import Entry, owner_of

__all__ = ["router"]

router = APIRouter(tags=["openai"])
Json = dict[str, Any]
Included = Literal["message.output_text.logprobs"]
Include = Annotated[list[Included] | None, Query()]
IncludeList = Annotated[list[Included] | None, Query(alias="include[]")]
"""The same, as some clients write lists."""
Again = Annotated[Literal["false"] | None, Query()]
CANCEL_SECONDS = 5.0
"""How long `cancel` waits for the engine to let go."""
MOST_ITEMS = 2 * LIMITS["messages"]
"""Of a conversation, those of the responses that it goes on from included."""
PAGE = 100
"""Most items of a page of input items."""


@router.post("/v1/responses", summary="Answer, and remember", openapi_extra=body_of(ResponseBody), response_model=None)
async def create(request: Request) -> Response:
    """OpenAI's responses."""
    state = state_of(request)
    body = await parse(request, ResponseBody)
    answer = _Answer(state, body, owner_of(request))
    events = state.run(body.model, answer.call)
    try:
        began = await until_gone(request, begun(events))
    except WorkerError as error:
        refusal = api_error(error)
        refusal.param = "input" if refusal.param == "messages" else refusal.param
        raise refusal from None
    if began is None:
        return Response(status_code=499)
    answer.begin(began)
    if body.stream:
        source = answer.stream(events)
        return EventStream(source, headers=answer.headers, ping_seconds=state.settings.ping_seconds)
    if await until_gone(request, answer.whole(events)) is None:
        return Response(status_code=499)
    return JSONResponse(answer.growing.body, headers=answer.headers)


@router.post("/v1/responses/input_tokens", summary="How long a prompt would be", openapi_extra=body_of(ResponseBody))
async def input_tokens(request: Request) -> Response:
    """The tokens that a response would be given. Takes what `create` takes, and nothing comes of it."""
    state = state_of(request)
    body = await parse(request, ResponseBody)
    chat = _Answer(state, body, owner_of(request)).call.prompt
    assert isinstance(chat, Chat)
    slot, _ = state.models.find(body.model)
    told = await until_gone(request, state.ask(body.model, "count", chat=asdict(slot.spec.opened(chat))))
    if told is None:
        return Response(status_code=499)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": told["count"]})


@router.get("/v1/responses/{id}", summary="A response that was stored")
async def retrieve(
    request: Request, id: str, include: Include = None, include_list: IncludeList = None, stream: Again = None
) -> Json:
    """The response as it is now, whole: it is not streamed again, and logprobs are there if it was made with them."""
    entry = _entry(request, id)
    _check_included(id, entry.body["output"], include or include_list)
    return entry.body


@router.delete("/v1/responses/{id}", summary="Forget a response")
async def delete(request: Request, id: str) -> Json:
    """Forget it; responses that go on from it keep what they were given."""
    state = state_of(request)
    entry = _entry(request, id)
    if not entry.over.is_set():
        raise ApiError(409, f"{id} is still growing: cancel it first", code="response_in_progress")
    state.stored.drop(entry.id)
    return {"id": entry.id, "object": "response", "deleted": True}


@router.post("/v1/responses/{id}/cancel", summary="End a response that still grows")
async def cancel(request: Request, id: str) -> Json:
    """End it: from another connection than the one that it is sent to."""
    state = state_of(request)
    entry = _entry(request, id)
    if entry.over.is_set():
        status = entry.body["status"]
        if status == "cancelled":
            return entry.body
        raise ApiError(400, f"{id} is {status}: there is nothing to cancel", code="invalid_value")
    entry.cancelled = True
    for running in state.running:
        if running.id == entry.id:
            running.stop("the response was cancelled")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(entry.over.wait(), CANCEL_SECONDS)
    return entry.body


@router.get("/v1/responses/{id}/input_items", summary="What a response was given")
async def input_items(
    request: Request,
    id: str,
    limit: int = 20,
    order: str = "desc",
    after: str | None = None,
    include: Include = None,
    include_list: IncludeList = None,
) -> Json:
    """The items of the conversation, those of earlier responses included; newest first unless order is asc."""
    if not 1 <= limit <= PAGE:
        raise ApiError(400, f"limit is {limit}: expected 1 to {PAGE}", param="limit", code="invalid_value")
    if order not in ("asc", "desc"):
        raise ApiError(400, "order: expected asc or desc", param="order", code="invalid_value")
    items = list(_entry(request, id).given)
    _check_included(id, items, include or include_list)
    if order == "desc":
        items.reverse()
    if after is not None:
        at = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if at is None:
            raise ApiError(400, f"after: there is no item {after[:80]!a}", param="after", code="invalid_value")
        items = items[at + 1 :]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(items) > limit}


def _check_included(id: str, items: list[Json], include: list[Included] | None) -> None:
    """Raise ApiError (400) for log-probabilities of replies that have none: they cannot be had afterwards."""
    parts = [
        part for one in items if one["type"] == "message" for part in one["content"] if part["type"] == "output_text"
    ]
    if include and any(part["text"] for part in parts) and not any(part.get("logprobs") for part in parts):
        what = f"include: {id} was made without log-probabilities: ask for them when a response is made"
        raise ApiError(400, what, param="include", code="invalid_value")


def _entry(request: Request, id: str) -> Entry:
    entry = state_of(request).stored.find(id, owner_of(request))
    if entry is None:
        raise ApiError(404, f"there is no response {id[:80]!a}: it was deleted, forgotten or never stored")
    return entry


class _Answer:
    """A request, its call, and what comes of it."""

    def __init__(self, state: State, body: ResponseBody, owner: str) -> None:
        self._state = state
        self._given = [*_earlier(state, body.previous_response_id, owner), *items_from(body.input)]
        if len(self._given) > MOST_ITEMS:
            what = (
                f"the conversation has {len(self._given):,} items, and {MOST_ITEMS:,} is all that may: begin a new one"
            )
            raise ApiError(400, what, param="input", code="too_much_work")
        id = new_id("resp_")
        tools = _tools(body)
        self.call = Call(id, _chat(state, body, self._given, tools), _sampling(body), salt=body.cache_salt or "")
        self.growing = Growing(_body(id, body, tools), logprobs=LOGPROBS in (body.include or ()))
        self._entry = None if body.store is False else Entry(id, owner, self.growing.body, self._given)
        self._began: list[Json] = []

    def begin(self, began: Began) -> None:
        """The call was taken."""
        self._began = self.growing.begin(began)
        self.headers = {}
        if left := began.truncated:
            self.headers["X-Herd-Truncated"] = f"messages={left.dropped_messages}; tokens={left.dropped_tokens}"
        if self._entry is not None:
            self._state.stored.put(self._entry)

    async def whole(self, events: AsyncGenerator[Event, None]) -> bool:
        """Wait for all of it. Raises what went wrong, unless somebody cancelled it."""
        try:
            async with contextlib.aclosing(events):
                async for one in events:
                    self.growing.take(one)
        except HerdError as error:
            if self._entry is None or not self._entry.cancelled:
                self.growing.fail(api_error(error))
                raise
            self.growing.cancel()
        finally:
            self._over()
        return True

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
        """The events as they come."""
        try:
            async with contextlib.aclosing(events):
                for made in self._began:
                    yield _sent(made)
                async for one in events:
                    for made in self.growing.take(one):
                        yield _sent(made)
        except HerdError as error:
            stopped = self._entry is not None and self._entry.cancelled
            for made in self.growing.cancel() if stopped else self.growing.fail(told(error, "a stream of responses")):
                yield _sent(made)
        finally:
            self._over()

    def _over(self) -> None:
        """Nothing more comes. A response whose client went away is cancelled."""
        if self.growing.body["status"] == "in_progress":
            self.growing.cancel()
        if self._entry is not None:
            if self._state.stored.find(self._entry.id, self._entry.owner) is not None:
                self._state.stored.put(self._entry)
            self._entry.over.set()


def _sent(made: Json) -> bytes:
    return event(made, made["type"])


def _earlier(state: State, id: str | None, owner: str) -> list[Json]:
    """The conversation up to the response that a new one goes on from."""
    if id is None:
        return []
    entry = state.stored.find(id, owner)
    if entry is None:
        what = f"there is no response {id[:80]!a}: it was deleted, forgotten or never stored"
        raise ApiError(400, what, param="previous_response_id", code="previous_response_not_found")
    if entry.body["status"] not in ("completed", "incomplete"):
        what = f"{id} is {entry.body['status']}: only what is complete can be gone on with"
        raise ApiError(400, what, param="previous_response_id", code="invalid_value")
    return entry.items


def _tools(body: ResponseBody) -> list[FunctionTool]:
    out = []
    for i, one in enumerate(body.tools or ()):
        if one.get("type") != "function":
            raise refuse_tool(one.get("type"), f"tools[{i}]")
        try:
            out.append(checked(one, FunctionTool))
        except ApiError as error:
            where = f"tools[{i}]" if error.param is None else f"tools[{i}].{error.param}"
            raise ApiError(400, f"tools[{i}]: {error.message}", param=where, code=error.code) from None
    return out


def _chat(state: State, body: ResponseBody, items: list[Json], tools: list[FunctionTool]) -> Chat:
    messages = messages_from_items(items)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    check_work(state, 1, size_of(messages, (_function(tool) for tool in tools)), "input")
    form = None if body.text is None else body.text.format
    choice, name = body.tool_choice or "auto", None
    if isinstance(choice, NamedFunction):
        choice, name = "named", choice.name
    elif isinstance(choice, AllowedTools):
        allowed = {one.name for one in choice.tools}
        tools, choice = [tool for tool in tools if tool.name in allowed], choice.mode
    return Chat(
        messages=tuple(messages),
        tools=tuple(_function(tool) for tool in tools),
        tool_choice=choice,  # type: ignore[arg-type]
        tool_name=name,
        parallel=body.parallel_tool_calls is not False,
        truncate=body.truncation == "auto",
        note=note_of(form.name, form.description) if form is not None else "",
    )


def _function(tool: FunctionTool) -> Json:
    """A tool as chat completions write it."""
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}


def _sampling(body: ResponseBody) -> Json:
    sampling = sampling_of(body)
    if body.max_output_tokens is not None:
        sampling["max_tokens"] = body.max_output_tokens
    if LOGPROBS in (body.include or ()):
        sampling["logprobs"] = body.top_logprobs or 0
    form = None if body.text is None else body.text.format
    if form is not None and form.type != "text":
        if any(name in sampling for name in ("schema", "regex", "choices", "grammar", "json_object")):
            raise ApiError(400, "text.format: a reply can be held to one form only", param="text.format")
        sampling |= {"schema": form.schema_} if form.type == "json_schema" else {"json_object": True}
    check_sampling(sampling, max_tokens="max_output_tokens", schema="text.format", json_object="text.format")
    return sampling


def _body(id: str, body: ResponseBody, tools: list[FunctionTool]) -> Json:
    """The response before anything came of it. Null sampling fields are the checkpoint's own."""
    form = None if body.text is None or body.text.format is None else body.text.format
    choice = body.tool_choice or "auto"
    shown = [tool.model_dump() | {"strict": bool(tool.strict)} for tool in tools]
    return {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": shown,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }
