"""`POST /v1/completions`: texts and ids that are gone on with."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StringConstraints, model_validator

from herd.chat.params import MAX_INT, MAX_N
from herd.errors import HerdError
from herd.server.errors import error_body, told
from herd.server.fields import LIMITS, body_of, checked, content_of
from herd.server.openai.chat import check_told, check_work, longest
from herd.server.openai.chat_body import ResponseFormat
from herd.server.openai.replies import prompt_logprobs, timings, total, usage
from herd.server.openai.sampling import SamplingBody, check_sampling, sampling_of
from herd.server.protocol import Began, Call, Ended, Event, Finished, Ids, Piece, Text, TokenInfo, Usage
from herd.server.providers.relay import relayed
from herd.server.sse import DONE, EventStream, TextFrame, event, until_gone
from herd.server.state import State, begun, new_id, state_of

__all__ = ["CompletionBody", "router"]

router = APIRouter(tags=["openai"])
Id = Annotated[int, Field(ge=0, le=MAX_INT)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=LIMITS["prompts"])]
IdList = Annotated[list[Id], Field(min_length=1, max_length=LIMITS["ids"])]
IdLists = Annotated[list[IdList], Field(min_length=1, max_length=LIMITS["prompts"])]
DEFAULT_TOKENS = 16
"""OpenAI's max_tokens for completions, where none is said."""


class CompletionBody(SamplingBody):
    """A completion request."""

    prompt: str | Prompts | IdList | IdLists
    suffix: str | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=LIMITS["top_logprobs"])
    response_format: ResponseFormat | None = None
    metadata: dict[str, Annotated[str, StringConstraints(max_length=512)]] | None = Field(
        None, max_length=LIMITS["metadata"]
    )

    refused: ClassVar = {
        "prompt_embeds": "embeddings are not taken as prompts: send text or ids",
        "truncation": "only conversations can be shortened: cut the prompt yourself",
    }
    neutral: ClassVar = dict(SamplingBody.neutral) | {
        "add_special_tokens": (True,),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }

    @model_validator(mode="after")
    def _together(self) -> CompletionBody:
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of: the best of several cannot be streamed, leave stream out")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of: it is less than n, so that many cannot be chosen from it")
        if self.suffix is not None:
            if self.echo:
                raise ValueError("suffix: the middle is not told with its prompt, leave echo out")
            if self.prompt and isinstance(self.prompt, list) and not isinstance(self.prompt[0], str):
                raise ValueError("suffix: it goes with prompts that are text")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens: 0 leaves nothing to tell, but with echo or prompt_logprobs")
        return self


@router.post("/v1/completions", summary="Go on with texts", openapi_extra=body_of(CompletionBody), response_model=None)
async def completions(request: Request) -> Response:
    """OpenAI's completions: a text, ids, or lists of them; `suffix` fills in the middle with Code Llama."""
    state = state_of(request)
    content = await content_of(request)
    if (provider := state.providers.of(content)) is not None:
        return await relayed(request, provider, "completions", content)
    body = checked(content, CompletionBody)
    calls = calls_of(body, state)
    answer = _Answer(state, body, len(calls))
    runs = [state.run(body.model, call) for call in calls]
    if body.stream:
        started = await until_gone(request, _all_begun(runs))
        if started is None:
            return Response(status_code=499)
        answer.begin(started)
        return EventStream(answer.stream(runs), ping_seconds=state.settings.ping_seconds)
    return await until_gone(request, _whole(answer, runs)) or Response(status_code=499)


def calls_of(body: CompletionBody, state: State) -> list[Call]:
    """A call for each prompt. Raises ApiError (400) for what cannot be honoured."""
    sampling = sampling_of(body)
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    sampling["max_tokens"] = most or 1
    if body.best_of is not None:
        sampling["best_of"] = body.best_of
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
        if body.echo:
            sampling["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    if body.response_format is not None and body.response_format.type != "text":
        form = body.response_format
        sampling |= {"json_object": True} if form.json_schema is None else {"schema": form.json_schema.schema_}
    check_sampling(sampling)
    prompts = _prompts(body.prompt)
    size = sum(map(len, prompts))
    check_work(state, (body.best_of or body.n or 1), size, "prompt")
    _check_told(state, body, size, len(prompts) * most)
    id = new_id("cmpl-")
    return [
        Call(
            f"{id}-{i}",
            Text(prompt, body.suffix) if isinstance(prompt, str) else Ids(tuple(prompt)),
            sampling,
            salt=body.cache_salt or "",
            echo=bool(body.echo),
            only_prompt=most == 0,
        )
        for i, prompt in enumerate(prompts)
    ]


def _check_told(state: State, body: CompletionBody, size: int, generated: int) -> None:
    """Raise ApiError (400) for more logprobs than one answer tells; `size`: of all prompts, `generated`: of all replies."""
    n = body.n or 1
    if body.prompt_logprobs is not None:
        check_told(state, n * size * (body.prompt_logprobs + 1), "prompt_logprobs", state.settings.max_prompt_told)
    if body.echo and body.logprobs is not None:
        check_told(state, n * size * (body.logprobs + 1), "logprobs", state.settings.max_prompt_told)
    if body.logprobs is not None:
        growing = 0 if body.stream else min(generated, longest(state, body.model) * len(_prompts(body.prompt)))
        check_told(state, n * (growing + (size if body.echo else 0)) * (body.logprobs + 1), "logprobs")


def _prompts(prompt: Any) -> list[Any]:
    """The prompts of a request, each a text or ids."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    return prompt


async def _all_begun(runs: Sequence[AsyncGenerator[Event, None]]) -> list[Began]:
    """The first events of all of them. When one is refused, none goes on."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(begun(run)) for run in runs]
    except ExceptionGroup as several:
        for run in runs:
            await run.aclose()
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]


async def _merged(runs: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all, as they come, each with the number of its run. Closing it closes all."""
    if len(runs) == 1:
        async with contextlib.aclosing(runs[0]) as only:
            async for one in only:
                yield 0, one
        return
    found: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(64)

    async def follow(number: int, run: AsyncGenerator[Event, None]) -> None:
        try:
            async with contextlib.aclosing(run) as events:
                async for one in events:
                    await found.put((number, one))
            await found.put((number, None))
        except Exception as error:
            await found.put((number, error))

    tasks = [asyncio.create_task(follow(i, run)) for i, run in enumerate(runs)]
    left = len(tasks)
    try:
        while left:
            number, one = await found.get()
            if one is None:
                left -= 1
            elif isinstance(one, BaseException):
                raise one
            else:
                yield number, one
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(answer: _Answer, runs: Sequence[AsyncGenerator[Event, None]]) -> Response:
    answer.begin(await _all_begun(runs))
    async with contextlib.aclosing(_merged(runs)) as events:
        async for number, one in events:
            answer.take(number, one)
    return JSONResponse(answer.whole())


class _Answer:
    """The answer while it grows: choices of all prompts, prompt by prompt."""

    def __init__(self, state: State, body: CompletionBody, prompts: int) -> None:
        self.state, self.body = state, body
        self.n = body.n or 1
        self.choices = [_Choice() for _ in range(prompts * self.n)]
        self.usages: list[Usage] = []
        self.head: dict[str, Any] = {}
        self.began: list[Began] = []

    def begin(self, began: list[Began]) -> None:
        """All prompts were taken."""
        about = self.state.models.find(self.body.model)[0].about
        self.began = began
        self.head = {
            "id": began[0].call.rpartition("-")[0],
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.body.model,
            "system_fingerprint": None if about is None else about.fingerprint,
        }
        if self.body.echo:
            for i, one in enumerate(began):
                for choice in self.choices[i * self.n : (i + 1) * self.n]:
                    choice.text.append(one.prompt_text or "")

    def take(self, number: int, one: Event) -> None:
        """The next event of prompt `number`."""
        if isinstance(one, Piece):
            if one.prompt:
                for choice in self.choices[number * self.n : (number + 1) * self.n]:
                    choice.prompt = one.prompt
                    if self.body.echo and self.body.logprobs is not None:
                        choice.tokens[:0] = one.prompt
            choice = self.choices[number * self.n + one.index]
            choice.text.append(one.text)
            choice.tokens += one.tokens
        elif isinstance(one, Ended):
            self.choices[number * self.n + one.index].ended = one
        elif isinstance(one, Finished):
            self.usages.append(one.usage)

    def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        counts = total(self.usages)
        choices = [
            self._choice(i, "".join(choice.text), choice.tokens, 0, choice.ended)
            for i, choice in enumerate(self.choices)
        ]
        if self.body.prompt_logprobs is not None:
            for choice, told in zip(choices, self.choices, strict=True):
                choice["prompt_logprobs"] = prompt_logprobs(told.prompt)
        return {**self.head, "choices": choices, "usage": usage(counts), "timings": timings(counts)}

    async def stream(self, runs: Sequence[AsyncGenerator[Event, None]]) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        echoed = [bool(self.body.echo)] * len(self.choices)
        waits = self.body.echo and self.body.logprobs is not None
        scored = self.body.logprobs is not None
        texts = [TextFrame(lambda text, i=i: self._chunk(i, text, ())) for i in range(len(self.choices))]
        try:
            async with contextlib.aclosing(_merged(runs)) as events:
                if self.body.echo and not waits:
                    for i, choice in enumerate(self.choices):
                        yield self._chunk(i, "".join(choice.text), ())
                async for number, one in events:
                    self.take(number, one)
                    if isinstance(one, Piece):
                        if one.prompt:
                            for i in range(number * self.n, (number + 1) * self.n):
                                if waits and echoed[i]:
                                    yield self._chunk(i, self.began[number].prompt_text or "", one.prompt)
                                if self.body.prompt_logprobs is not None:
                                    yield self._chunk(i, "", (), prompt=one.prompt)
                        if one.text or one.tokens:
                            index = number * self.n + one.index
                            yield self._chunk(index, one.text, one.tokens) if scored else texts[index](one.text)
                    elif isinstance(one, Ended):
                        yield self._chunk(number * self.n + one.index, "", (), one)
            options = self.body.stream_options
            if options is not None and options.include_usage:
                counts = total(self.usages)
                yield event({**self.head, "choices": [], "usage": usage(counts), "timings": timings(counts)})
        except HerdError as error:
            yield event(error_body(told(error, "a stream of completions"), "openai"))
        yield DONE

    def _chunk(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenInfo],
        ended: Ended | None = None,
        prompt: tuple[TokenInfo, ...] = (),
    ) -> bytes:
        choice = self.choices[index]
        made = self._choice(index, text, tokens, choice.told, ended)
        choice.told += sum(len(token.text) for token in tokens if token.data)
        if prompt:
            made["prompt_logprobs"] = prompt_logprobs(prompt)
        return event({**self.head, "choices": [made]})

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenInfo], offset: int, ended: Ended | None
    ) -> dict[str, Any]:
        logprobs = None if self.body.logprobs is None else _logprobs(tokens, offset)
        reason: Literal["stop", "length"] | None = None
        if ended is not None:
            reason = "length" if ended.reason == "length" else "stop"
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": None if ended is None else ended.detail,
        }


class _Choice:
    """One choice while it grows."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.tokens: list[TokenInfo] = []
        self.prompt: tuple[TokenInfo, ...] = ()
        self.ended: Ended | None = None
        self.told = 0
        """Characters whose tokens were told, for the offsets of a stream."""


def _logprobs(tokens: Sequence[TokenInfo], offset: int) -> dict[str, Any]:
    """A completion's `logprobs`: four lists."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text) if token.data else 0  # a special token is not in the text
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {text: logprob for _, text, _, logprob in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }
