"""`POST /v1/embeddings`: texts and ids as vectors."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from herd.chat.params import MAX_INT
from herd.server.caller import caller
from herd.server.errors import ApiError
from herd.server.fields import LIMITS, Body, body_of, checked, content_of
from herd.server.openai.chat import check_work
from herd.server.process import WorkerError
from herd.server.providers.relay import relayed
from herd.server.sse import until_gone
from herd.server.state import State, state_of

__all__ = ["EmbeddingBody", "embedded", "floats", "router"]

router = APIRouter(tags=["openai"])
Id = Annotated[int, Field(ge=0, le=MAX_INT)]
Text = Annotated[str, Field(min_length=1)]
IdList = Annotated[list[Id], Field(min_length=1, max_length=LIMITS["ids"])]
AT_ONCE = 1 << 14
"""Characters or ids of one question to the worker: between two of them, a request whose client is gone ends."""


class EmbeddingBody(Body):
    """An embedding request."""

    model: str = Field(min_length=1, max_length=512)
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=LIMITS["inputs"])]
        | IdList
        | Annotated[list[IdList], Field(min_length=1, max_length=LIMITS["inputs"])]
    )
    dimensions: int | None = Field(None, ge=1, le=MAX_INT)
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    user: str | None = Field(None, max_length=1024)

    refused: ClassVar = {
        "messages": "conversations are not embedded: send texts or ids as input",
        "truncate_prompt_tokens": "inputs are never cut: cut them yourself",
    }
    neutral: ClassVar = {
        "add_special_tokens": (True,),
        "priority": (0,),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
    }

    @model_validator(mode="after")
    def _some(self) -> EmbeddingBody:
        if isinstance(self.input, list) and not self.input:
            raise ValueError("input: there is nothing to embed")
        return self


@router.post("/v1/embeddings", summary="Texts as vectors", openapi_extra=body_of(EmbeddingBody), response_model=None)
async def embeddings(request: Request) -> Response:
    """OpenAI's embeddings: a Llama's final states, pooled."""
    state = state_of(request)
    content = await content_of(request)
    if (provider := state.providers.of(content)) is not None:
        return await relayed(request, provider, "embeddings", content)
    body = checked(content, EmbeddingBody)
    inputs: list[Any] = [body.input] if isinstance(body.input, str) or isinstance(body.input[0], int) else body.input  # type: ignore[list-item]
    check_work(state, 1, sum(map(len, inputs)), "input")
    found = await until_gone(
        request, embedded(state, body.model, inputs, dimensions=body.dimensions, normalize=body.normalize is not False)
    )
    if found is None:
        return Response(status_code=499)
    vectors, counts = found
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": vector if body.encoding_format == "base64" else floats(vector),
        }
        for i, vector in enumerate(vectors)
    ]
    tokens = sum(counts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


async def embedded(
    state: State, model: str, inputs: Sequence[Any], *, dimensions: int | None = None, normalize: bool = True
) -> tuple[list[str], list[int]]:
    """Of each input (a text or ids) its vector, float32 little-endian in base64, and its tokens. Raises as `State.run`."""
    vectors: list[str] = []
    counts: list[int] = []
    pooling, who = state.settings.pooling, caller()
    who.model = model
    for part in _parts(inputs):
        try:
            found = await state.ask(
                model, "embed", adapted=True, prompts=part, pooling=pooling, dimensions=dimensions, normalize=normalize
            )
        except WorkerError as error:
            raise _named(error, len(vectors), dimensions) from None
        state.counts.rates.spend(who.account, sum(found["tokens"]))
        who.prompt_tokens += sum(found["tokens"])
        vectors += found["vectors"]
        counts += found["tokens"]
    return vectors, counts


def floats(vector: str) -> list[float]:
    """The numbers of a vector in base64."""
    numbers = array("f", base64.b64decode(vector))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _parts(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    part: list[Any] = []
    size = 0
    for one in inputs:
        if part and size + len(one) > AT_ONCE:
            yield part
            part, size = [], 0
        part.append(one)
        size += len(one)
    if part:
        yield part


def _named(error: WorkerError, first: int, dimensions: int | None) -> Exception:
    """What is wrong with an input, by its number in the request and with the field's name."""
    text = str(error)
    if error.kind == "ConfigError" and dimensions is not None and text.startswith("dimensions"):
        return ApiError(400, text, param="dimensions", code="invalid_value")
    if error.kind not in ("ContextFullError", "PromptError", "TokenizerError") or not text.startswith("prompt "):
        return error
    number, _, rest = text.removeprefix("prompt ").partition(" ")
    if not number.isdigit():
        return error
    where = f"input[{first + int(number)}]"
    code = "context_length_exceeded" if error.kind == "ContextFullError" else "invalid_value"
    return ApiError(400, f"{where} {rest}", param=where, code=code)
