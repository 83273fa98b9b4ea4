"""`POST /v1/moderations`: what a Llama Guard says of texts."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from herd.chat.guard import Verdict, parse_verdict
from herd.server.errors import ApiError
from herd.server.fields import LIMITS, Body, body_of, parse
from herd.server.openai.chat import check_work
from herd.server.openai.replies import total, usage
from herd.server.process import WorkerError
from herd.server.protocol import Began, Call, Chat, Finished, Piece, TokenInfo, Usage
from herd.server.sse import until_gone
from herd.server.state import State, new_id, state_of

__all__ = ["MEANINGS", "ModerationBody", "moderations", "router"]

router = APIRouter(tags=["openai"])
Text = Annotated[str, Field(min_length=1)]
ALIASES = ("omni-moderation-latest", "text-moderation-latest", "text-moderation-stable")
"""OpenAI's names for whatever moderates; the answer says which model that was."""
NAMES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
MEANINGS: Mapping[str, tuple[str, ...]] = {
    "Violence and Hate": ("violence", "hate"),
    "Sexual Content": ("sexual",),
    "Criminal Planning": ("illicit",),
    "Guns and Illegal Weapons": ("illicit/violent",),
    "Regulated or Controlled Substances": ("illicit",),
    "Self-Harm": ("self-harm",),
    "Violent Crimes": ("violence",),
    "Non-Violent Crimes": ("illicit",),
    "Sex Crimes": ("sexual",),
    "Child Exploitation": ("sexual/minors",),
    "Indiscriminate Weapons": ("illicit/violent",),
    "Hate": ("hate",),
}
"""OpenAI's categories that mean what a Guard's category does, by the Guard's name. The others (Defamation, Privacy, ...) have no
counterpart: they flag the text, and stand in the answer's `guard` only."""
VERDICT_TOKENS = 100
"""A verdict is at most two line ends, `unsafe`, and 14 codes with commas: about 45 tokens."""
TOP = 20
AT_ONCE = 8


class ModerationPart(Body):
    """A text in the form that also has images."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: dict[str, Any] | None = None


class ModerationBody(Body):
    """Texts to be judged, each as what a user has said. Parts in a list are one text."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=LIMITS["prompts"])]
        | Annotated[list[ModerationPart], Field(min_length=1, max_length=LIMITS["prompts"])]
    )
    model: str | None = Field(None, min_length=1, max_length=512)

    refused: ClassVar = {"user": "nobody is remembered here: leave it out"}


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of one text: the probability that the Guard says unsafe, and where its policy is from."""

    verdict: Verdict
    score: float
    notes: tuple[str, ...]
    usage: Usage


@router.post(
    "/v1/moderations", summary="Whether texts are safe", openapi_extra=body_of(ModerationBody), response_model=None
)
async def moderations(request: Request) -> Response:
    """OpenAI's moderations, by the Llama Guard that the server was given."""
    state = state_of(request)
    body = await parse(request, ModerationBody)
    guard = state.settings.guard
    if guard is None:
        raise ApiError(
            501, "this server judges nothing: start it with --guard MODEL, a Llama Guard", code="not_configured"
        )
    slot, _ = state.models.find(guard)
    if body.model is not None and body.model not in (*ALIASES, guard, *slot.spec.aliases):
        what = f"{body.model[:80]!a} does not moderate here: leave model out, or name {guard}"
        raise ApiError(400, what, param="model", code="invalid_value")
    texts = _texts(body)
    check_work(state, 1, sum(map(len, texts)), "input")
    answer = await until_gone(request, _judged(state, guard, texts))
    return Response(status_code=499) if answer is None else JSONResponse(answer)


def _texts(body: ModerationBody) -> list[str]:
    if isinstance(body.input, str):
        return [body.input]
    parts = []
    for i, one in enumerate(body.input):
        if isinstance(one, str):
            parts.append(one)
            continue
        if one.type == "image_url" or one.text is None:
            what = f"input[{i}] is no text, and the guard reads text only"
            raise ApiError(400, what, param=f"input[{i}]", code="unsupported_content")
        parts.append(one.text)
    return parts if isinstance(body.input[0], str) else ["\n".join(parts)]


async def _judged(state: State, guard: str, texts: list[str]) -> dict[str, Any]:
    try:
        facts = await state.ask(guard, "guard")
    except WorkerError as error:
        if error.kind != "ConfigError":
            raise
        raise ApiError(501, f"{guard} cannot moderate: {error}", code="not_configured") from None
    turns = asyncio.Semaphore(AT_ONCE)

    async def judge(i: int, text: str) -> Judged:
        async with turns:
            return await _judge(state, guard, facts, i, text)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(judge(i, text)) for i, text in enumerate(texts)]
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    found = [task.result() for task in tasks]
    return {
        "id": new_id("modr-"),
        "model": guard,
        "results": [_result(one, facts["categories"]) for one in found],
        "usage": usage(total([one.usage for one in found])),
    }


async def _judge(state: State, guard: str, facts: Mapping[str, Any], i: int, text: str) -> Judged:
    sampling = {"temperature": 0, "max_tokens": VERDICT_TOKENS, "logprobs": TOP}
    call = Call(new_id("modr-"), Chat(messages=({"role": "user", "content": text},)), sampling)
    said: list[str] = []
    tokens: list[TokenInfo] = []
    notes: tuple[str, ...] = ()
    counts = Usage(0)
    async with contextlib.aclosing(state.run(guard, call)) as events:
        async for one in events:
            if isinstance(one, Began):
                notes = one.notes
            elif isinstance(one, Piece):
                said.append(one.text)
                tokens += one.tokens
            elif isinstance(one, Finished):
                counts = one.usage
    verdict = parse_verdict("".join(said), facts["categories"])
    score = _score(tokens, facts["safe"], facts["unsafe"])
    if verdict.label == "failed" or score is None:
        # What it said instead can repeat the text, and errors are logged.
        why = (
            "neither safe nor unsafe was likely" if verdict.label != "failed" else "its reply is not of the form of one"
        )
        raise ApiError(500, f"the guard gave no verdict on input[{i}]: {why}", code="moderation_failed")
    return Judged(verdict, score, notes, counts)


def _score(tokens: Iterable[TokenInfo], safe: int, unsafe: int) -> float | None:
    """P(unsafe) against P(safe) where the verdict stands: at the first token that is no line end. None: neither is likely there.

    One that is not among the likeliest is taken to be impossible.
    """
    first = next((token for token in tokens if token.text.strip()), None)
    if first is None:
        return None
    known = {id: logprob for id, _, _, logprob in first.top}
    if first.logprob is not None:
        known[first.id] = first.logprob
    a, b = (math.exp(known.get(id, -math.inf)) for id in (safe, unsafe))
    return b / (a + b) if a + b > 0 else None


def _result(found: Judged, categories: Mapping[str, str]) -> dict[str, Any]:
    """OpenAI's result, and what the Guard itself said under `guard`."""
    violated = [categories[code] for code in found.verdict.codes]
    named = {name for category in violated for name in MEANINGS.get(category, ())}
    covered = {name for category in categories.values() for name in MEANINGS.get(category, ())}
    return {
        "flagged": found.verdict.label == "unsafe",
        "categories": {name: name in named for name in NAMES},
        "category_scores": {name: found.score if name in named else 0.0 for name in NAMES},
        "category_applied_input_types": {name: ["text"] if name in covered else [] for name in NAMES},
        "guard": {
            "verdict": found.verdict.label,
            "score": found.score,
            "categories": {
                code: {"name": name, "violated": code in found.verdict.codes} for code, name in categories.items()
            },
            "notes": list(found.notes),
        },
    }
