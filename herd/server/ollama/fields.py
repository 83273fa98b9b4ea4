"""What requests of Ollama's API share: options, the form of the reply, how long a model stays loaded. No torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar

from pydantic import Field, StringConstraints
from starlette.requests import Request

from herd.chat.params import MAX_INT
from herd.server.errors import ApiError
from herd.server.fields import LIMITS, B, Body, checked, parse
from herd.server.models import Slot
from herd.server.openai.sampling import check_sampling
from herd.server.protocol import Ready
from herd.server.state import State

__all__ = ["Options", "ReplyBody", "check_context", "keep", "lasting", "read", "sampling_of", "seconds_of"]

MAX_STOPS = 16
Stop = Annotated[str, StringConstraints(min_length=1, max_length=LIMITS["stop_length"])]
FOREVER = 2**31
"""Seconds of a keep_alive that means: never unload it."""


class Options(Body):
    """`options`: each of Ollama's is honoured, or refused with the reason."""

    temperature: float | None = Field(None, ge=0, le=1e6)
    top_k: int | None = Field(None, ge=0, le=MAX_INT)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=1e6)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=MAX_INT)
    num_predict: int | None = Field(None, ge=-2, le=MAX_INT)
    num_ctx: int | None = Field(None, ge=1, le=MAX_INT)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None

    refused: ClassVar = {
        "num_thread": "threads are chosen when the server starts: leave it out",
        "use_mmap": "how weights are read is chosen by the server: leave it out",
        "use_mlock": "weights are not locked in memory: leave it out",
        "vocab_only": "a model without weights says nothing: leave it out",
        "embedding_only": "use /api/embed: leave it out",
        "logits_all": "use logprobs: leave it out",
        "mirostat_tau": "there is no mirostat: use top_p or min_p",
        "mirostat_eta": "there is no mirostat: use top_p or min_p",
    }
    neutral: ClassVar = {
        "mirostat": (0,),
        "tfs_z": (1, 1.0),
        "repeat_last_n": (-1,),
        "penalize_newline": (True,),
        "num_keep": (0, -1),
        "num_gpu": (-1,),
        "main_gpu": (0,),
        "num_batch": (),
        "low_vram": (False,),
        "numa": (False,),
        "f16_kv": (),
        "draft_num_predict": (),
    }


class ReplyBody(Body):
    """What chats and texts share. `stream` is true where it is not said."""

    model: str = Field(min_length=1, max_length=512)
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LIMITS["top_logprobs"])

    refused: ClassVar = {
        "think": "Llama models do not think apart: leave it out",
        "context": "ids of earlier turns are not taken: use /api/chat, whose prompts are found in the cache",
        "width": "this server makes no images: leave it out",
        "height": "this server makes no images: leave it out",
        "steps": "this server makes no images: leave it out",
    }
    neutral: ClassVar = {"think": (False,), "shift": (False,), "template": ("",), "images": ([],), "context": ([],)}


async def read(request: Request, model: type[B]) -> B:
    """A request's body. Ollama's users do not say that it is JSON; a page in a browser has to, as everywhere."""
    return await parse(request, model, any_type="origin" not in request.headers)


def sampling_of(body: ReplyBody) -> dict[str, Any]:
    """Fields of SamplingParams. Raises ApiError (400) naming the field."""
    try:
        options = checked(body.options or {}, Options)
    except ApiError as error:
        name = f"options.{error.param}" if error.param else "options"
        unknown = "unknown field: " if error.code == "unknown_parameter" else ""
        message = f"{unknown}options.{error.message.removeprefix(unknown)}"
        raise ApiError(400, message, param=name, code=error.code) from None
    out: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty"):
        if (value := getattr(options, name)) is not None:
            out[name] = value
    if options.repeat_penalty is not None:
        out["repetition_penalty"] = options.repeat_penalty
    if options.seed is not None:
        out["seed"] = options.seed % 2**63
    if options.num_predict == 0:
        raise ApiError(400, "options.num_predict is 0: expected tokens, or -1 for as many as fit", param="num_predict")
    if options.num_predict is not None:
        out["max_tokens"] = options.num_predict if options.num_predict > 0 else None
    if options.stop is not None:
        out["stop"] = [options.stop] if isinstance(options.stop, str) else options.stop
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: set logprobs to true to have them", param="top_logprobs")
    if body.logprobs:
        out["logprobs"] = body.top_logprobs or 0
    if body.format == "json":
        out["json_object"] = True
    elif isinstance(body.format, dict):
        out["schema"] = body.format
    elif body.format:
        raise ApiError(400, f'format is {body.format[:40]!a}: expected "json" or a JSON schema', param="format")
    theirs = {"repetition_penalty": "repeat_penalty", "max_tokens": "num_predict"}
    named = {ours: f"options.{theirs.get(ours, ours)}" for ours in out if ours not in ("schema", "json_object")}
    check_sampling(out, schema="format", json_object="format", **named)
    return out


def check_context(options: dict[str, Any] | None, about: Ready) -> None:
    """Raise ApiError when more context is asked for than the model has. Less is fine: all that would fit there fits."""
    wanted = (options or {}).get("num_ctx")
    if isinstance(wanted, int) and wanted > about.context:
        raise ApiError(
            400,
            f"options.num_ctx is {wanted:,}, and this model runs with a context of {about.context:,} tokens: ask for no more, or "
            "start the server with -c",
            param="options.num_ctx",
            code="context_length_exceeded",
        )


def seconds_of(value: float | str | None) -> float | None:
    """Seconds of a keep_alive: a number, or a duration such as "5m" or "1h30m"; below 0 is FOREVER. None: not said.

    Raises ApiError (400).
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        sign = -1 if text.startswith("-") else 1
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|us|ns|h|m|s)", text.lstrip("+-"))
        if "".join(f"{number}{unit}" for number, unit in parts) == text.lstrip("+-") and parts:
            value = sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
        else:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
    if not math.isfinite(value):
        raise ApiError(400, 'keep_alive: expected seconds, or a time such as "5m" (-1: forever)', param="keep_alive")
    return FOREVER if value < 0 else min(value, FOREVER)


_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def lasting(state: State, model: str, given: float | str | None) -> float | None:
    """`seconds_of(given)` for the model that a client calls `model`.

    Raises ApiError (400) when the server was started with that model: how long it stays is for its operator to say.
    """
    seconds = seconds_of(given)
    if seconds is None:
        return None
    slot, _ = state.models.find(model)
    if any(slot.spec.name == spec.name for spec in state.settings.models):
        own = slot.spec.keep_alive
        if seconds != (FOREVER if own is None else own):
            stays = "as long as it runs" if own is None else f"for {own:g} idle seconds"
            what = f"keep_alive: the server was started with {slot.spec.name}, which stays loaded {stays}: leave it out"
            raise ApiError(400, what, param="keep_alive", code="unsupported_parameter")
    return seconds


def keep(slot: Slot, seconds: float | None) -> None:
    """Let the model stay loaded for as long as a request says, or as it was set up when the request says nothing."""
    slot.keep_alive = slot.spec.keep_alive if seconds is None else None if seconds >= FOREVER else seconds
