"""Strict request bodies: every field is honoured, or the request is refused and the field named. No torch.

A request is a `Body` (pydantic, strict, no unknown fields). Fields that an API has and this server does not honour stand in
`refused` with the reason; those with a value that changes nothing stand in `neutral` and are accepted with that value only.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema
from starlette.requests import Request

from herd.server.errors import ApiError
from herd.server.jsonbody import strict_json

__all__ = ["LIMITS", "Body", "body_of", "checked", "content_of", "known_query", "parse"]

LIMITS = {
    "n": 128,
    "top_logprobs": 20,
    "stop": 4,
    "stop_length": 256,
    "logit_bias": 1024,
    "messages": 2048,
    "tools": 128,
    "prompts": 128,
    "inputs": 2048,
    "metadata": 16,
    "ids": 1 << 20,
    "parts": 4096,
    "fields": 256,
}
"""Most of each in one request (reliability before all: what is beyond is refused before any work)."""
LARGE = 1 << 18
"""Bytes of a body; longer ones are read in a thread: 16 MB would hold the event loop up for 40 ms."""
MAX_INT = 2**63 - 1
NO_BODY = "the request has no body: send a JSON object (Content-Type: application/json)"


def _fail_fast(schema: Any) -> None:
    """Set fail_fast in all lists of a schema, in place."""
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if one.get("type") == "list":
                one["fail_fast"] = True
            left += [part for name, part in one.items() if name not in ("metadata", "serialization", "default")]
        elif isinstance(one, list | tuple):
            left += one


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, protected_namespaces=())

    refused: ClassVar[Mapping[str, str]] = {}
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        """Each unknown field and each bad entry would become an error of its own."""
        if isinstance(given, dict):
            if len(given) > LIMITS["fields"]:
                raise ValueError(f"an object of {len(given):,} fields: no request has more than {LIMITS['fields']}")
            for name in ("logit_bias", "metadata"):
                if isinstance(given.get(name), dict) and len(given[name]) > LIMITS["logit_bias"]:
                    raise ValueError(f"{name}: {len(given[name]):,} entries are too many")
        return given

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lists end at their first bad item: a million errors would take seconds, and a gigabyte."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


B = TypeVar("B", bound=Body)


async def parse(request: Request, model: type[B], *, any_type: bool = False) -> B:
    """The body of a request. Raises ApiError (400, or 415 for a body that is not JSON); all else as in `content_of`."""
    return checked(await content_of(request, any_type=any_type), model)


async def content_of(request: Request, *, any_type: bool = False) -> Any:
    """The JSON of a request. Raises ApiError (400 or 415).

    Bodies must say that they are JSON, or nothing, so that a form on some web page cannot send one unasked; `any_type` is for
    APIs whose users never say it, behind a check of the Origin header. The model that it names is known to `Models.find` then,
    if there is one.
    """
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json") and not any_type:
        raise ApiError(415, f"the body is {kind[:80]!r}: send JSON, with Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise ApiError(415, "the body is compressed: send it as it is")
    data = await request.body()
    if not data.strip():
        raise ApiError(400, NO_BODY, code="invalid_json")
    content = strict_json(data) if len(data) <= LARGE else await asyncio.to_thread(strict_json, data)
    if isinstance(content, dict) and isinstance(name := content.get("model"), str):
        await request.app.state.herd.models.meet(name)  # from here on it is known, and nothing waits for a disk
    return content


def checked(content: Any, model: type[B]) -> B:
    """A JSON value as a request. Raises ApiError (400) naming the field."""
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is {_kind(content)}: expected an object", code="invalid_type")
    content = dict(content)
    for name in list(content):
        if name in model.neutral and (
            content[name] is None or any(_same(content[name], one) for one in model.neutral[name])
        ):
            del content[name]
        elif name in model.neutral or name in model.refused:
            why = model.refused.get(name)
            if why is None:
                allowed = " or ".join(_shown(one) for one in model.neutral[name])
                why = f"only {allowed} is supported" if allowed else "this is not supported: leave it out"
            elif content[name] is None:
                del content[name]
                continue
            raise ApiError(400, f"{name}: {why}", param=name, code="unsupported_parameter")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None


async def known_query(request: Request) -> None:
    """Raise ApiError (400) for a query parameter that the route does not declare, or one that is there twice. For every route of
    an application; those that are in no document (the pages) are left alone."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    declared = {one.alias: one for one in route.dependant.query_params}
    seen: set[str] = set()
    for name, _ in request.query_params.multi_items():
        if name not in declared:
            shown = ascii(name[:60])[1:-1]
            raise ApiError(400, f"unknown query parameter: {shown}", param=shown, code="unknown_parameter")
        if name in seen and not _is_list(declared[name].field_info.annotation):
            raise ApiError(400, f"{name} is there twice", param=name, code="invalid_value")
        seen.add(name)


def _is_list(annotation: Any) -> bool:
    return any(get_origin(one) is list for one in (annotation, *get_args(annotation)))


def body_of(*models: type[Body]) -> dict[str, Any]:
    """`openapi_extra` for a route with such a body. The models' own definitions are moved to components by the app."""
    schemas = [one.model_json_schema(ref_template="#/components/schemas/{model}") for one in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong, in the words of an API."""
    found = error.errors(include_url=False, include_context=True, include_input=True)
    first = min(
        found, key=lambda one: (one["type"] != "extra_forbidden", one["type"].endswith("_type"), -len(one["loc"]))
    )
    where = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field: {where}", param=where, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where, code="missing_required_parameter")
    message = re.sub(
        r"^(Value error, |Input should be )", lambda m: "expected " if "Input" in m[0] else "", first["msg"]
    )
    if first["type"] == "value_error":  # our own words, which name the field themselves
        name = message.split(":")[0].split(" ")[0]
        known = re.fullmatch(r"[a-z_]+", name) is not None and "_" in name
        param = f"{where}.{name}" if where and known else where or (name if known else None)
        return ApiError(400, f"{where}: {message}" if where else message, param=param, code="invalid_value")
    value = first.get("input")
    shown = (
        f" is {_shown(value)}:"
        if isinstance(value, int | float | bool | None) or (isinstance(value, str) and len(value) < 40)
        else ":"
    )
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, f"{where}{shown} {message}", param=where, code=code)


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") as `messages[0].content`; what pydantic adds for unions is left out."""
    out = ""
    for part in loc:
        if isinstance(part, int):
            out += f"[{part}]"
        elif re.fullmatch(r"[a-z_][a-zA-Z0-9_]*", part) and part not in _UNION_WORDS:
            out += f".{part}" if out else part
        elif not out:
            out = ascii(part[:60])[1:-1]
    return out


_UNION_WORDS = {"str", "int", "float", "bool", "list", "dict", "none", "constrained"}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    """A value for a message: short, printable and ASCII."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > MAX_INT:
        return "an integer beyond 64 bits"
    return ascii(value)[:60]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b
